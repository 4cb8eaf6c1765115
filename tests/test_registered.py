"""Primitives of other packages: differentiated by the derivative they registered in JAX."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import fbprop

X = jnp.array([0.7, -1.3, 2.0])


def another_packages(name, impl, jvp=None, transpose=None):
    p = Primitive(f"test_{name}")
    p.def_impl(impl)
    p.def_abstract_eval(lambda x: x)
    mlir.register_lowering(p, mlir.lower_fun(impl, multiple_results=False))
    batching.primitive_batchers[p] = lambda args, dims: (p.bind(*args), dims[0])
    if jvp:
        ad.primitive_jvps[p] = jvp
    if transpose:
        ad.deflinear2(p, transpose)
    return p


tripled = another_packages("tripled", lambda x: x * 3, transpose=lambda ct, x: [tripled.bind(ct)])
squared = another_packages(
    "squared", jnp.square, jvp=lambda p, t: (squared.bind(*p), 2 * p[0] * tripled.bind(t[0]) / 3)
)
by_pullback = another_packages(
    "by_pullback", jnp.sin,
    jvp=lambda p, t: (by_pullback.bind(*p), jax.vjp(jnp.sin, *p)[1](jnp.ones_like(*p))[0] * t[0]),
)
of_its_own = another_packages(
    "of_its_own", jnp.sin,
    jvp=lambda p, t: (of_its_own.bind(*p), jax.grad(lambda x: jnp.sum(squared.bind(x)))(*p) * t[0]),
)
opaque = another_packages("opaque", jnp.sin)

USES = {
    "plain": lambda p: lambda x: p(x) * x,
    "jit": lambda p: lambda x: jax.jit(p)(x) * x,
    "vmap": lambda p: jax.vmap(lambda x: p(x) * x),
    "scan": lambda p: lambda x: lax.scan(lambda c, _: (p(c) * x, None), x, None, length=2)[0],
    "cond": lambda p: lambda x: lax.cond(x[0] > 0, p, jnp.sin, x),
    "checkpoint": lambda p: jax.checkpoint(lambda x: p(p(x))),
}


def slopes(grad):
    def run(x):
        found = {}
        for p, (use, of) in itertools.product((tripled, squared, by_pullback), USES.items()):
            found[f"{p}, {use}"] = grad(lambda x, f=of(p.bind): jnp.sum(f(x) ** 2))(x)
        twice = lambda x: jnp.sum(grad(lambda x: jnp.sum(squared.bind(x) ** 2))(x))
        return found | {"twice": grad(twice)(x)}

    return run


def assert_same(got, expected):
    for name, slope in expected.items():
        np.testing.assert_allclose(got[name], slope, rtol=1e-5, err_msg=name)


def test_by_the_derivative_that_was_registered():
    assert_same(jax.jit(slopes(fbprop.grad))(X), jax.jit(slopes(jax.grad))(X))


def test_where_jax_is_replaced_by_ours(monkeypatch):
    """A rule of theirs then calls ours, which asks the JAX it was imported with."""
    expected = jax.jit(slopes(jax.grad))(X)
    own = jax.grad(lambda x: jnp.sum(of_its_own.bind(x)))(X)
    for name in ("grad", "value_and_grad", "vjp"):
        monkeypatch.setattr(jax, name, getattr(fbprop, name))
    assert_same(jax.jit(slopes(jax.grad))(X), expected)
    got = jax.grad(lambda x: jnp.sum(of_its_own.bind(x)))(X)
    np.testing.assert_allclose(got, own, rtol=1e-6)
    wrong = fbprop.rule("sin", "y = sin x;  x̄ = 0", x=lambda dy: dy * 0)
    with pytest.raises(fbprop.CheckFailed):  # against JAX's, not against ours
        fbprop.check(jnp.sin, X, rules=fbprop.table.override(wrong), differences=False)


def test_explain_says_who_differentiates():
    fun = lambda x: jnp.sum(jnp.sin(squared.bind(x)))
    assert [x.rule for x in fbprop.explain(fun, X).lines] == ["jax.vjp", "sin", "reduce_sum"]
    with pytest.raises(fbprop.MissingRule, match="'test_squared'.*pass fallback='jax'"):
        fbprop.explain(fun, X, fallback=None)


@pytest.mark.parametrize("fallback", ["registered", None])
def test_without_a_registered_derivative(fallback):
    with pytest.raises(fbprop.MissingRule, match="test_opaque.*JAX has no derivative of it either"):
        fbprop.grad(lambda x: jnp.sum(opaque.bind(x)), fallback=fallback)(X)


def test_jaxs_own_need_a_rule_of_the_table():
    without = fbprop.Table(r for r in fbprop.table.values() if r.name != "sin")
    fun = lambda x: jnp.sum(jnp.sin(x))
    for fallback in ("registered", None):
        with pytest.raises(fbprop.MissingRule, match="'sin'.*pass fallback='jax'"):
            fbprop.grad(fun, rules=without, fallback=fallback)(X)
    np.testing.assert_allclose(
        fbprop.grad(fun, rules=without, fallback="jax")(X), jnp.cos(X), rtol=1e-6
    )


def test_training_takes_them_too():
    loss = lambda params, batch, key: jnp.sum(squared.bind(params))
    optimizer = fbprop.optim.sgd(0.25)
    state = fbprop.train.init(X + 0, optimizer)  # the step takes its memory
    after, _ = fbprop.train.step(loss, optimizer)(state, None)
    np.testing.assert_allclose(after.params, X / 2, rtol=1e-6)


def test_aux_that_does_not_depend_on_the_arguments_is_handed_back():
    given = (2.0, 3, np.float32(1.5), "text", np.ones(2), jnp.ones(2), jax.random.key(0))
    _, _, aux = fbprop.vjp(lambda x: (x, (x * 2, given)), X, has_aux=True)
    np.testing.assert_array_equal(aux[0], X * 2)
    assert all(a is b for a, b in zip(aux[1], given, strict=True))
