"""What the engine runs, keeps and skips; overrides; identification of library functions; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap

import fbprop

X = jnp.array([0.5, -1.0, 2.0])


def never(dy):
    raise AssertionError("this rule must not run")


def kept_shapes(fun, *primals, **options):
    pullback = fbprop.vjp(fun, *primals, **options)[1]
    return sorted(x.shape for x in jax.tree.leaves(pullback.kept))


def test_only_what_a_differentiated_input_reaches_is_differentiated():
    table = fbprop.table.override(fbprop.rule("sin", "", x=never))
    gradient = fbprop.grad(lambda x, y: jnp.sum(x * jnp.sin(y)), rules=table)
    np.testing.assert_allclose(gradient(X, X), jnp.sin(X))


def test_only_what_active_operands_ask_for_is_kept():
    assert kept_shapes(lambda x: x * X, X) == [(3,)]
    assert kept_shapes(lambda x: jnp.sum(x + 1.0), X) == []
    assert kept_shapes(lambda x: jnp.tanh(x) * x, X) == [(3,), (3,)]  # tanh x, shared, and x
    frozen = {"w": X}
    assert kept_shapes(lambda b: jnp.tanh(X * frozen["w"] + b), X) == [(3,)]


def test_what_no_result_needs_is_not_kept_and_not_run_backward():
    table = fbprop.table.override(fbprop.rule("sin", "", x=never))
    fun = lambda x: (x * 2.0, jnp.sin(x))
    _, pullback, _ = fbprop.vjp(fun, X, has_aux=True, rules=table)
    assert jax.tree.leaves(pullback.kept) == []
    np.testing.assert_allclose(pullback(X)[0], 2 * X)


def test_symbolic_zeros_skip_rules():
    """A cotangent that is zero because nothing flows (stop_gradient) never reaches a rule."""
    table = fbprop.table.override(fbprop.rule("sin", "", x=never))
    fun = lambda x: jnp.sum(lax.stop_gradient(jnp.sin(x)) * x)
    np.testing.assert_allclose(fbprop.grad(fun, rules=table)(X), jnp.sin(X))


def test_scan_keeps_invariants_once_and_nothing_twice():
    w = jnp.ones((3, 3)) * 0.1

    def fun(w, h, xs):
        def step(h, x):
            h = jnp.tanh(h @ jax.jit(jnp.exp)(w) + x)
            return h, (h, h)

        return lax.scan(step, h, xs)

    xs = jnp.ones((7, 3))
    # exp(w) once, not 7 times; the states going in stacked; tanh's result is the scanned result.
    assert kept_shapes(fun, w, X, xs) == [(3, 3), (7, 3), (7, 3)]


def test_scan_does_not_carry_zeros_back():
    """A carried metric that nothing differentiated reads costs nothing going backward."""
    table = fbprop.table.override(fbprop.rule("cos", "", x=never))

    def fun(x):
        def step(carry, _):
            h, metric = carry
            return (jnp.sin(h), metric + jnp.cos(h)), None

        (h, metric), _ = lax.scan(step, (x, x), None, length=3)
        return jnp.sum(h), metric

    ours, _ = fbprop.grad(fun, has_aux=True, rules=table)(X)
    np.testing.assert_allclose(ours, jax.grad(fun, has_aux=True)(X)[0], rtol=1e-6)


def test_a_carry_that_starts_at_a_constant():
    def fun(xs):
        return lax.scan(lambda c, x: (c + jnp.sin(x), None), 0.0, xs)[0]

    np.testing.assert_allclose(fbprop.grad(fun)(X), jnp.cos(X), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(fbprop.grad(fun))(X), jnp.cos(X), rtol=1e-6)


def test_while_runs_forward_and_refuses_backward():
    def fun(x, n):
        count = lax.while_loop(lambda i: i < n, lambda i: i + 1, 0)
        return jnp.sum(x) * count.astype(x.dtype)

    np.testing.assert_allclose(fbprop.grad(fun)(X, 3), 3.0)
    dynamic = lambda x, n: lax.fori_loop(0, n, lambda i, c: c * x, x)
    with pytest.raises(ValueError, match=r"does not work for lax.while_loop .* use lax.scan"):
        jax.jit(fbprop.grad(dynamic))(2.0, 3)
    value, pullback = fbprop.vjp(lambda x: jax.jit(dynamic)(x, 3), 2.0)
    assert value == 16.0
    with pytest.raises(ValueError, match="does not work for lax.while_loop"):
        pullback(1.0)
    static = lambda x: lax.fori_loop(0, 3, lambda i, c: c * x, x)
    np.testing.assert_allclose(fbprop.grad(static)(2.0), 32.0)


def test_linear_solve_with_auxiliary_output_and_without_a_transpose():
    a = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    solver = lambda _, y: (jnp.linalg.inv(a) @ y, {"steps": jnp.ones(())})
    symmetric = lambda b: jnp.sum(
        lax.custom_linear_solve(lambda v: a @ v, b, solver, symmetric=True, has_aux=True)[0]
    )
    tree = lambda b: jnp.sum(
        lax.custom_linear_solve(
            lambda v: {"x": a @ v["x"], "y": 2.0 * v["y"]},
            {"x": b, "y": b * b},
            lambda _, v: {"x": jnp.linalg.inv(a) @ v["x"], "y": v["y"] / 2.0},
            symmetric=True,
        )["y"]
        * b
    )
    np.testing.assert_allclose(fbprop.grad(tree)(X[:2]), jax.grad(tree)(X[:2]), rtol=1e-6)
    np.testing.assert_allclose(fbprop.grad(symmetric)(X[:2]), jax.grad(symmetric)(X[:2]), rtol=1e-6)
    no_transpose = lambda b: jnp.sum(
        lax.custom_linear_solve(lambda v: a @ v, b, lambda _, y: jnp.linalg.inv(a) @ y)
    )
    with pytest.raises(TypeError, match=r"transpose_solve required .*test_engine.py"):
        fbprop.grad(no_transpose)(X[:2])


def test_branches_on_the_platform():
    fun = lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=lambda x: x * x)
    np.testing.assert_allclose(fbprop.grad(fun)(0.3), jax.grad(fun)(0.3), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(fbprop.grad(fun))(0.3), jax.grad(fun)(0.3), rtol=1e-6)


def test_calls_that_jax_itself_does_not_go_back_through():
    @custom_vmap
    def double(x):
        return 2.0 * jnp.sin(x)

    double.def_vmap(lambda axis_size, batched, x: (2.0 * jnp.sin(x), batched[0]))
    np.testing.assert_allclose(fbprop.grad(double)(0.3), 2.0 * jnp.cos(0.3), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(fbprop.grad(double))(X), 2.0 * jnp.cos(X), rtol=1e-6)
    composite = lax.composite(lambda x: jnp.sin(x), name="test.sin")
    np.testing.assert_allclose(fbprop.grad(composite)(0.3), jnp.cos(0.3), rtol=1e-6)


def test_remat_computes_again():
    assert kept_shapes(jax.checkpoint(lambda y: jnp.sin(jnp.sin(y))), X) == [(3,)]
    jaxpr = str(jax.make_jaxpr(fbprop.grad(lambda x: jnp.sum(jax.checkpoint(jnp.sin)(x))))(X))
    assert "optimization_barrier" in jaxpr


def test_override_everywhere_and_by_path():
    def fun(x):
        with jax.named_scope("encoder"):
            with jax.named_scope("first"):
                x = jnp.tanh(x)
            x = jnp.tanh(x)
        return jnp.sum(jnp.tanh(x))

    def scaled(by):
        return fbprop.rule("tanh", "", x=lambda dy, out: by * dy * (1 - out * out))

    plain = fbprop.grad(fun)(X)
    for where, factor in [
        (None, 8.0),
        ("encoder/*", 4.0),
        ("encoder/first/*", 2.0),
        ("*/first/*", 2.0),
        ("encoder/tanh", 2.0),
        ("decoder/*", 1.0),
        ("tanh", 2.0),
    ]:
        table = fbprop.table.override(scaled(2.0), where=where)
        np.testing.assert_allclose(fbprop.grad(fun, rules=table)(X), factor * plain, rtol=1e-6)
        jitted = fbprop.grad(jax.jit(fun), rules=table)  # inside a compiled call as well
        np.testing.assert_allclose(jitted(X), factor * plain, rtol=1e-6)
        jitted = jax.jit(fbprop.grad(fun, rules=table))
        np.testing.assert_allclose(jitted(X), factor * plain, rtol=1e-6)
    later = fbprop.table.override(scaled(2.0)).override(scaled(3.0), where="encoder/first/*")
    np.testing.assert_allclose(fbprop.grad(fun, rules=later)(X), 12.0 * plain, rtol=1e-6)


def test_overrides_hold_in_loops_and_branches_and_leave_no_stale_caches():
    f = jax.jit(lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=2)[0])
    g = lambda x: lax.cond(True, f, jnp.cos, x)
    blocked = fbprop.table.override(fbprop.rule("sin", "", x=lambda dy: None))
    for fun in (f, g):
        expected = jax.grad(fun)(0.3)
        np.testing.assert_allclose(fbprop.grad(fun)(0.3), expected, rtol=1e-6)
        assert fbprop.grad(fun, rules=blocked)(0.3) == 0.0
        np.testing.assert_allclose(fbprop.grad(fun)(0.3), expected, rtol=1e-6)


def test_a_library_function_overridden_in_a_scope_is_found_inside_a_loop():
    def step(x, _):
        with jax.named_scope("encoder"):
            return jax.nn.silu(x), None

    fun = lambda x: lax.scan(step, x, None, length=2)[0]
    blocked = fbprop.rule("jax.nn.silu", "", x=lambda dy: None)
    assert fbprop.grad(fun, rules=fbprop.table.override(blocked, where="encoder/*"))(0.3) == 0.0
    elsewhere = fbprop.table.override(blocked, where="decoder/*")
    np.testing.assert_allclose(fbprop.grad(fun, rules=elsewhere)(0.3), jax.grad(fun)(0.3), 1e-6)


def test_the_table_is_immutable_and_lists_its_rules():
    before = dict(fbprop.table)
    other = fbprop.table.override(fbprop.rule("tanh", "mine", x=lambda dy: dy))
    assert dict(fbprop.table) == before
    assert other["tanh"].math == "mine"
    assert len(other) == len(fbprop.table)
    with pytest.raises(TypeError):
        fbprop.table["tanh"] = before["tanh"]
    with pytest.raises(TypeError, match=r"got function expected fbprop.Rule"):
        fbprop.table.override(lambda dy: dy)
    with pytest.raises(TypeError, match=r"got str expected fbprop.Rule"):
        fbprop.register("tanh")


def guided():
    """Guided backpropagation: only positive cotangents pass."""
    return fbprop.table.override(
        fbprop.rule(
            "jax.nn.relu", "", x=lambda dy, out: jnp.where(out > 0, jnp.maximum(dy, 0.0), 0.0)
        )
    )


def test_library_functions_are_recognised():
    fun = lambda x: jnp.sum(jax.nn.relu(x) * jnp.array([-1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(fbprop.grad(fun)(X), [-1.0, 0.0, 1.0])
    np.testing.assert_array_equal(fbprop.grad(fun, rules=guided())(X), [0.0, 0.0, 1.0])
    for wrap in (jax.jit, jax.checkpoint):
        np.testing.assert_array_equal(fbprop.grad(wrap(fun), rules=guided())(X), [0.0, 0.0, 1.0])


def impostors():
    """Functions named like library functions that are not them."""

    def relu(x):  # another value
        return jnp.maximum(x, 0.0) * 2.0

    yield "value", jax.jit(relu), lambda x: jnp.where(x > 0, 2.0, 0.0)

    @jax.custom_jvp
    def relu(x):  # the library's own value, another derivative
        return jax.jit(lambda x: jnp.maximum(x, 0))(x)

    relu.defjvps(lambda t, ans, x: t * 3.0)
    yield "derivative", relu, lambda x: jnp.full(x.shape, 3.0)

    same_body = jax.custom_jvp(jax.nn.relu.__wrapped__)  # the very function object
    same_body.defjvps(lambda t, ans, x: t * 5.0)
    yield "body shared", same_body, lambda x: jnp.full(x.shape, 5.0)

    @jax.custom_vjp
    def relu(x):
        return jnp.maximum(x, 0.0)

    relu.defvjp(lambda x: (relu(x), ()), lambda _, ct: (7.0 * ct,))
    yield "custom_vjp", relu, lambda x: jnp.full(x.shape, 7.0)


@pytest.mark.parametrize(
    ("fun", "expected"), [(f, e) for _, f, e in impostors()], ids=[name for name, *_ in impostors()]
)
def test_a_users_function_called_relu_never_gets_the_librarys_rule(fun, expected):
    table = fbprop.table.override(fbprop.rule("jax.nn.relu", "", x=never))
    gradient = fbprop.grad(lambda x: jnp.sum(fun(x)), rules=table)
    np.testing.assert_allclose(gradient(X), expected(X).astype(X.dtype), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(gradient)(X), expected(X).astype(X.dtype), rtol=1e-6)


def test_a_users_log_softmax_never_gets_the_librarys_rule():
    @jax.jit
    def log_softmax(x):
        return x - jnp.log(jnp.sum(jnp.exp(x) * 2.0))

    table = fbprop.table.override(fbprop.rule("jax.nn.log_softmax", "", x=never))
    fun = lambda x: jnp.sum(log_softmax(x) * X)
    np.testing.assert_allclose(fbprop.grad(fun, rules=table)(X), jax.grad(fun)(X), rtol=1e-6)
    with pytest.raises(AssertionError, match="must not run"):
        fbprop.grad(lambda x: jnp.sum(jax.nn.log_softmax(x) * X), rules=table)(X)


def mystery():
    """A primitive of the user's own: JAX can differentiate it, the table does not know it."""
    from jax.extend.core import Primitive
    from jax.interpreters import ad, mlir

    p = Primitive("test_mystery")
    p.def_impl(lambda x: x * 3.0)
    p.def_abstract_eval(lambda x: x)
    mlir.register_lowering(p, mlir.lower_fun(lambda x: x * 3.0, multiple_results=False))
    ad.deflinear2(p, lambda ct, x: [p.bind(ct)])
    return p


MYSTERY = mystery()


def test_a_missing_rule_says_what_where_and_how_to_go_on():
    def inner(x):
        with jax.named_scope("encoder"):
            return MYSTERY.bind(x)

    @jax.jit
    def fun(x):
        with jax.named_scope("model"):
            return jnp.sum(lax.scan(lambda c, _: (inner(c), None), x, None, length=2)[0])

    with pytest.raises(fbprop.MissingRule) as error:
        fbprop.grad(fun, fallback=None)(X)
    message = str(error.value)
    for part in (
        "'test_mystery'",
        "operand 0 (float32[3])",
        "test_engine.py:",
        "(test_a_missing",
        "encoder",
        "fbprop.register(fbprop.rule('test_mystery', ...))",
        "fallback='jax'",
    ):
        assert part in message, message
    np.testing.assert_allclose(
        fbprop.grad(lambda x: jnp.sum(jnp.sin(x)) + jnp.sum(MYSTERY.bind(X)))(X), jnp.cos(X)
    )
    for fallback in ("registered", "jax"):
        np.testing.assert_allclose(fbprop.grad(fun, fallback=fallback)(X), 9.0)
    mine = fbprop.table.override(fbprop.rule("test_mystery", "y = 3x", x=lambda dy: 3.0 * dy))
    np.testing.assert_allclose(fbprop.grad(fun, rules=mine)(X), 9.0)


@pytest.mark.parametrize(
    ("pullback", "match"),
    [
        (
            lambda dy: dy[:2],
            r"got float32\[2\] expected float32\[3\] for operand 0 of 'sin' \(at .*test_engine",
        ),
        (lambda dy: dy.astype("float16"), r"got float16\[3\] expected float32\[3\]"),
        (lambda dy: dy.astype("int32"), r"got int32\[3\] expected float32\[3\]"),
        (lambda dy: dy[None], r"got float32\[1,3\]|got float32\[1, 3\]"),
    ],
)
def test_a_rule_that_returns_no_cotangent_of_its_operand(pullback, match):
    table = fbprop.table.override(fbprop.rule("sin", "", x=pullback))
    with pytest.raises(fbprop.CotangentError, match=match):
        fbprop.grad(lambda x: jnp.sum(jnp.sin(x)), rules=table)(X)


def test_a_rule_that_returns_the_wrong_number_of_cotangents():
    table = fbprop.table.override(fbprop.pair("sin", "", lambda site, kept, dy: [dy, dy]))
    with pytest.raises(
        fbprop.CotangentError,
        match="one cotangent per operand, got 2 expected 1 from the rule for 'sin'",
    ):
        fbprop.grad(jnp.sin, rules=table)(1.0)


def test_a_rule_that_asks_for_what_is_not_there():
    with pytest.raises(TypeError, match=r"got 'z' expected one of \('x', 'out'\)"):
        fbprop.rule("sin", "", x=lambda dy, z: dy)
    table = fbprop.table.override(fbprop.rule("sin", "", x=lambda dy, *, axis: dy))
    with pytest.raises(TypeError, match="got 'axis' expected one of .* in the rule for 'sin'"):
        fbprop.grad(jnp.sin, rules=table)(1.0)
    table = fbprop.table.override(fbprop.rule("sin", "", x=lambda dy: dy, y=None))
    with pytest.raises(
        TypeError, match=r"names every operand .* got 2 \(x, y\) expected 1 for 'sin'"
    ):
        fbprop.grad(jnp.sin, rules=table)(1.0)
