"""Python looks at values of a function that is differentiated: as under `jax.grad`, everywhere."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop

V = jnp.array([1.0, -2.0, 3.0])
ERRORS = (
    jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError, jax.errors.NonConcreteBooleanIndexError,
)


def branch(x):
    return 2.0 * x**3 if x > 0 else x


def root(x):
    """The square root, iterated until it is near enough."""
    y = x
    while jnp.abs(y * y - x) > 0.1:
        y = 0.5 * (y + x / y)
    return y


def halved_until_small(x):
    steps = 0
    while x > 1:
        x, steps = x / 2, steps + 1
    return x * steps


def checked(x):
    assert x > 0
    assert jnp.all(x < 9), "too large"
    return x * x


ASKS = {
    "if": branch,
    "while": halved_until_small,
    "until it converges": root,
    "assert": checked,
    "bool": lambda x: x * x if bool(x) else x,
    "not": lambda x: x * x if not x < 1 else 2.0 * x,
    "and, or": lambda x: x if x > 0 and (x < 1 or x > 2) else x * x,
    "comparison twice": lambda x: x * x if 0 < x < 3 else x,
    "conditional on equality": lambda x: 3.0 * x if x == 2 else x,
    "int": lambda x: x * int(x),
    "index of a list": lambda x: x * [1.0, 2.0, 3.0][x.astype(int)],
    "range": lambda x: sum(x**i for i in range(x.astype(int))),
    "hex, oct": lambda x: x * len(hex(x.astype(int)) + oct(x.astype(int))),
    "item": lambda x: x * x.item(),
    "round, floor of an integer": lambda x: x * len(range(round(x))) * int(jnp.floor(x)),
    "power by an integer": lambda x: x ** (x.astype(int) + 1),
    "power by itself": lambda x: x**x if x > 1 else x,
    "dynamic bounds of a loop": lambda x: lax.fori_loop(0, x.astype(int), lambda i, c: c * x, x),
    "arange": lambda x: x * jnp.arange(x.astype(int)).size,
    "linspace": lambda x: x * jnp.sum(jnp.linspace(0.0, 1.0, x.astype(int))),
    "reshape": lambda x: jnp.sum(x * jnp.arange(4.0).reshape(x.astype(int), 2)[0]),
    "slice": lambda x: jnp.sum(x * V[: x.astype(int)]),
    "a key's number": lambda x: x * x if jax.random.uniform(jax.random.key(0)) < x else x,
    "float of a boolean": lambda x: x * float(x > 0) * complex(x > 1).real,
    "stop_gradient": lambda x: x * float(lax.stop_gradient(x * 2.0)),
    "inside jax.grad": lambda x: jax.grad(lambda y: y**3 * x if y > x - 1 else y)(x),
    "inside jax.vmap": lambda x: jnp.sum(jax.vmap(lambda a: a * x if x > 0 else a)(V)),
    "beside jit": lambda x: jax.jit(jnp.sin)(x) if jax.jit(jnp.cos)(x) < 0 else x,
    "beside checkpoint": lambda x: jax.checkpoint(lambda y: y * jnp.sin(y))(x) if x > 0 else x,
    "a loop's last value": lambda x: (
        x * x if lax.while_loop(lambda c: c < 9, lambda c: c * 2, x) > 9 else x
    ),
}
ASKS_VECTOR = {
    "any, all": lambda v: jnp.sum(v * v) if jnp.any(v > 2) and not jnp.all(v > 2) else jnp.sum(v),
    "in": lambda v: jnp.sum(v * v) if 3.0 in v and v[0] in [1.0, 2.0] else v[0],
    "iteration": lambda v: sum(x * x for x in v if x > 0),
    "sorted, max": lambda v: sorted(v)[0] * max(v) * min(v, key=jnp.abs),
    "list.index": lambda v: v[[bool(x > 2) for x in v].index(True)] ** 2,
    "mask": lambda v: jnp.sum(v[v > 0] ** 2),
    "mask set": lambda v: jnp.sum(v.at[v < 0].set(0.0) ** 2),
    "nonzero": lambda v: jnp.sum(v[jnp.nonzero(v > 0)] ** 2),
    "where of one argument": lambda v: jnp.sum(v[jnp.where(v < 0)] ** 2),
    "argwhere, flatnonzero": lambda v: jnp.sum(
        v[jnp.argwhere(v > 0)[:, 0]] * v[jnp.flatnonzero(v > 0)]
    ),
    "unique": lambda v: jnp.sum(v) * jnp.unique(jnp.sign(v)).size,
    "repeat": lambda v: jnp.sum(jnp.repeat(v, jnp.abs(v).astype(int)) ** 2),
    "bincount": lambda v: jnp.sum(v) * jnp.bincount(jnp.abs(v).astype(int)).size,
    "asarray of a mask": lambda v: (
        jnp.sum(v * v, where=np.asarray(v > 0)) * int(np.asarray(jnp.argmax(v)))
    ),
    "tolist of integers": lambda v: v[jnp.argsort(v).tolist()[0]] ** 2,
    "attributes of integers": lambda v: v[jnp.argmax(v).block_until_ready()] * len(
        jnp.argmax(v).devices()
    ),
    "device_get": lambda v: jnp.sum(v * jax.device_get(v)),
    "len, shape, dtype": lambda v: jnp.sum(v) * len(v) * v.shape[0] * v.dtype.itemsize,
}


def outcome(module, fun, *args):
    """Value and gradient, or the error's class."""
    try:
        return jax.tree.map(np.asarray, module.value_and_grad(fun)(*args))
    except Exception as error:
        return type(error)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b))
        if jnp.result_type(b) != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("fun", ASKS.values(), ids=ASKS)
def test_a_number_is_asked_for_its_value(fun):
    theirs = outcome(jax, fun, 2.0)
    assert not isinstance(theirs, type), theirs
    assert_same(outcome(fbprop, fun, 2.0), theirs)


@pytest.mark.parametrize("fun", ASKS_VECTOR.values(), ids=ASKS_VECTOR)
def test_a_vector_is_asked_for_its_values(fun):
    theirs = outcome(jax, fun, V)
    assert not isinstance(theirs, type), theirs
    assert_same(outcome(fbprop, fun, V), theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_of_every_type(dtype):
    def fun(x):
        y = x * x if jnp.abs(x) > 1 else x
        return jnp.real(y) if int(jnp.real(y)) > 2 else jnp.real(y * 2)

    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(2.0, dtype)
        assert_same(outcome(fbprop, fun, x), outcome(jax, fun, x))


def test_holomorphic():
    fun = lambda z: z * z if jnp.abs(z) > 1 else z
    ours = fbprop.grad(fun, holomorphic=True)(1 + 2j)
    np.testing.assert_allclose(ours, jax.grad(fun, holomorphic=True)(1 + 2j))


TEXTS = {
    "print": lambda x: x * len(f"{x}"),
    "format": lambda x: x * len(f"{x:.3f}"),
    "str, repr": lambda x: x * len(str(x) + repr(x)),
}


@pytest.mark.parametrize("fun", TEXTS.values(), ids=TEXTS)
def test_printed_values_are_numbers(fun, capsys):
    def shown(x):
        print(x, x > 1, f"{x:.3f}")
        return fun(x)

    fbprop.grad(shown)(2.0)
    assert capsys.readouterr().out == "Recorded(2.0) Recorded(True) 2.000\n"
    with jax.ensure_compile_time_eval():
        assert fbprop.grad(lambda x: x)(2.0) == 1.0


LOSES = {
    "float": lambda x: x * float(x),
    "complex": lambda x: x * complex(x).real,
    "asarray": lambda x: x * np.asarray(x),
    "a function of numpy's": lambda x: x * np.sin(x),
    "tolist": lambda x: x * (x * V).tolist()[0],
    "percent": lambda x: x * len("%.2f" % x),  # noqa: UP031
    "of a function around": lambda x: fbprop.grad(lambda y: y * float(x))(1.0),
}


@pytest.mark.parametrize("fun", LOSES.values(), ids=LOSES)
def test_what_would_lose_a_derivative_is_refused_as_in_jax(fun):
    assert issubclass(outcome(jax, fun, 2.0), ERRORS)
    with pytest.raises(
        outcome(jax, fun, 2.0),
        match=r"What Python takes out of a differentiated array has no derivative, got .* of a "
        r"float32\[3?\] at .*test_values.py:\d+ \(<lambda>\) expected jax.lax.stop_gradient",
    ):
        fbprop.grad(fun)(2.0)


TRACED = {
    "jit": (lambda x: jax.jit(lambda y: y if y > 0 else -y)(x), r"bool\(\) of a bool\[\]"),
    "jit, what is around": (lambda x: jax.jit(lambda y: y if x > 0 else -y)(x), r"bool\(\)"),
    "scan": (
        lambda x: lax.scan(lambda c, _: (c if c > 0 else -c, None), x, length=2)[0], r"bool\(\)",
    ),
    "cond": (lambda x: lax.cond(x > 0, lambda y: y if y > 1 else -y, jnp.sin, x), r"bool\(\)"),
    "checkpoint": (lambda x: jax.checkpoint(lambda y: y if y > 1 else -y)(x), r"bool\(\)"),
    "vmap": (lambda x: jnp.sum(jax.vmap(lambda a: a * x if a > 0 else x)(V)), r"bool\(\)"),
    "float": (lambda x: jax.jit(lambda y: y * float(y))(x), r"float\(\) of a float32\[\]"),
    "index": (lambda x: jax.jit(lambda y: y * [1.0, 2.0][y.astype(int)])(x), "an integer of a int"),
    "range": (lambda x: jax.jit(lambda y: sum([y for _ in range(y.astype(int))]))(x), "an integer"),
    "asarray": (lambda x: jax.jit(lambda y: y * np.asarray(y))(x), "a NumPy array of a float32"),
    "mask": (lambda x: jax.jit(lambda y: jnp.sum(V[y < V]))(x), r"mask is True of a bool\[3\]"),
    "arange": (lambda x: jax.jit(lambda y: y * jnp.sum(jnp.arange(y)))(x), "the value of a float"),
}


@pytest.mark.parametrize(("fun", "got"), TRACED.values(), ids=TRACED)
def test_what_is_not_known_raises_as_in_jax_with_a_sentence_of_ours(fun, got):
    assert issubclass(outcome(jax, fun, 1.0), ERRORS)
    with pytest.raises(
        outcome(jax, fun, 1.0),
        match=rf"A value is not known while .*, got .*{got}.* at .*test_values.py:\d+ \(<lambda>\) "
        r"expected an operation on arrays: jax.lax.cond or jnp.where .* or make what .* a static",
    ) as raised:
        fbprop.grad(fun)(1.0)
    assert any("jax.errors" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("outside", [jax.jit, jax.vmap, lambda g: lambda v: lax.map(g, v)])
def test_values_are_not_known_under_a_trace_around(outside):
    v = V if outside is not jax.jit else V[0]
    with pytest.raises(jax.errors.TracerBoolConversionError, match="A value is not known while"):
        outside(fbprop.grad(branch))(v)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        outside(jax.grad(branch))(v)


def test_what_does_not_depend_on_the_trace_around_is_known():
    compiled = lambda module: jax.vmap(lambda y: module.grad(root)(2.0) * y)(V)
    np.testing.assert_allclose(compiled(fbprop), compiled(jax))
    two = jnp.float32(2.0)
    fun = lambda x: x * x if x else x
    compiled = lambda module: jax.jit(lambda y: y * module.grad(fun)(two))(3.0)
    np.testing.assert_allclose(compiled(fbprop), compiled(jax))


@pytest.mark.parametrize("fun", [branch, root])
def test_orders(fun):
    second = jax.grad(jax.grad(fun))(2.0)
    ours = fbprop.grad(fun)
    for found in (
        fbprop.grad(ours)(2.0), jax.grad(ours)(2.0), fbprop.grad(jax.grad(fun))(2.0),
        jax.jvp(ours, (2.0,), (1.0,))[1], jax.jacfwd(ours)(2.0), jax.linearize(ours, 2.0)[1](1.0),
    ):
        np.testing.assert_allclose(found, second, rtol=1e-5)
    third = jax.grad(jax.grad(jax.grad(branch)))(2.0)
    np.testing.assert_allclose(fbprop.grad(fbprop.grad(fbprop.grad(branch)))(2.0), third)


def test_a_value_of_the_function_around():
    fun = lambda module: module.grad(lambda y: module.grad(lambda x: x**2 * y if y > 0 else x)(2.0))
    np.testing.assert_allclose(fun(fbprop)(3.0), fun(jax)(3.0))


def test_vjp_of_several_arguments_and_results():
    def fun(x, i, tree):
        y = x[i] * tree["w"] if i > 0 else x[0]
        if y < 0:
            return x, y, x, {"y": y, "i": i}
        return x * 2, y * y, tree["w"], {"y": x[0], "i": -i}

    for w in (2.0, -2.0):
        args = V, 2, {"w": jnp.float32(w)}
        (ours, pull), (theirs, pull_jax) = fbprop.vjp(fun, *args), jax.vjp(fun, *args)
        assert_same(ours, theirs)
        cotangent = jax.tree.map(lambda y: np.ones(np.shape(y), jax.dtypes.float0)
                                 if jnp.result_type(y) == jnp.int32 else 3 * y, theirs)
        assert_same(pull(cotangent), pull_jax(cotangent))
        assert_same(jax.jit(lambda pull, c: pull(c)[0])(pull, cotangent), pull_jax(cotangent)[0])


def test_aux():
    def fun(x):
        y = x * x
        return (root(y) if y > 1 else y), {"known": bool(y > 1), "y": y, "n": x > 1, "text": "a"}

    (ours, aux), (theirs, expected) = (m.grad(fun, has_aux=True)(2.0) for m in (fbprop, jax))
    np.testing.assert_allclose(ours, theirs)
    np.testing.assert_allclose(aux.pop("y"), expected.pop("y"))
    assert aux == expected
