"""Functions with a derivative of their own that is stated by the functions themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero

import fbprop

X = jnp.array([0.7, -1.3, 2.0])


@jax.custom_jvp
def triple(x):
    return x * 3


triple.defjvp(lambda p, t: (triple(*p), triple(*t)))


@jax.custom_jvp
def times(x, y):
    return x * y


times.defjvp(lambda p, t: (times(*p), times(t[0], p[1]) + times(p[0], t[1])))


@jax.custom_jvp
def double(x):
    return x * 2


@jax.custom_jvp
def fivefold(x):
    return x * 5


double.defjvp(lambda p, t: (double(*p), fivefold(*t) * 0.4))
fivefold.defjvp(lambda p, t: (fivefold(*p), double(*t) * 2.5))


@jax.custom_jvp
def first_moves(x, y):
    return x * 3 + y


@functools.partial(first_moves.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    assert isinstance(tangents[1], SymbolicZero), "the second operand does not move"
    return first_moves(*primals), first_moves(tangents[0], jnp.zeros(()))


@jax.custom_jvp
def eightfold(x):
    return lax.scan(lambda c, _: (c * 2, None), x, None, length=3)[0]


@eightfold.defjvp
def _(primals, tangents):
    step = lambda t: lax.scan(lambda c, _: (jax.jit(eightfold)(c), None), t, None, length=1)[0]
    return eightfold(*primals), lax.cond(primals[0][0] > 0, eightfold, step, tangents[0])


def root(a):
    newton = lambda f, x: lax.fori_loop(0, 30, lambda _, x: x - f(x) / (3 * x**2), x)
    return lax.custom_root(lambda x: x**3 - a, jnp.ones(()), newton, lambda g, y: y / g(1.0))


FUNCTIONS = {
    "linear": triple,
    "of itself": lambda x: triple(triple(x) * x),
    "bilinear": lambda x: times(x, jnp.sin(x)),
    "bilinear, one operand": lambda x: times(x, X),
    "mutual": lambda x: double(fivefold(x)) * x,
    "symbolic zeros": lambda x: first_moves(x, 2.0) * x,
    "loop inside": eightfold,
    "loop inside, other branch": lambda x: eightfold(-x),
    "in jit": lambda x: jax.jit(triple)(x) * x,
    "in vmap": jax.vmap(lambda x: times(x, x)),
    "in scan": lambda x: lax.scan(lambda c, _: (times(triple(c), X), c), x, None, length=3)[1],
    "in cond": lambda x: lax.cond(x[0] > 0, triple, jnp.sin, x),
    "in checkpoint": jax.checkpoint(lambda x: jnp.sin(triple(jnp.sin(x)))),
    "root": lambda x: root(jnp.sum(x**2)),
}


TWICE = ("of itself", "bilinear", "mutual", "in scan")


def test_a_rule_that_calls_its_own_function_on_the_tangents():
    def squared_slopes(grad):
        inner = lambda f: lambda x: jnp.sum(grad(lambda y: jnp.sum(f(y) ** 2))(x) ** 2)
        return lambda x: {name: grad(inner(FUNCTIONS[name]))(x) for name in TWICE}

    def slopes(grad):
        slope = lambda f, x: grad(lambda y: jnp.sum(jnp.sin(f(y))))(x)
        return lambda x: {name: slope(f, x) for name, f in FUNCTIONS.items()}

    for run in (slopes, squared_slopes):
        expected = jax.jit(run(jax.grad))(X)
        got = jax.jit(run(fbprop.grad))(X)
        for name, slope in expected.items():
            assert np.abs(slope).max() > 0
            np.testing.assert_allclose(got[name], slope, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_of_any_type_and_shape(dtype):
    for shape in [(), (0,), (2, 1)]:
        x = jnp.full(shape, 1.5, dtype)
        f = lambda x: times(triple(x), x)
        out, pullback = fbprop.vjp(f, x)
        expected = jax.vjp(f, x)[1](out)[0]
        np.testing.assert_array_equal(pullback(out)[0], expected, strict=True)
