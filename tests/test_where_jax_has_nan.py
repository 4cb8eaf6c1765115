"""Derivatives that exist where JAX's are nan or inexact: the values are stated here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop

INF = float("inf")


def masked_entropy(x):
    p = jax.nn.softmax(x)
    return -jnp.sum(jax.scipy.special.xlogy(p, p))


CASES = {
    "logsumexp of nothing": (jax.nn.logsumexp, [-INF, -INF], [0, 0]),
    "logsumexp with nothing": (jax.nn.logsumexp, [-INF, 1.0], [0, 1]),
    "gelu, large": (lambda x: jnp.sum(jax.nn.gelu(x)), [6e4, 300.0, -300.0, -6e4], [1, 1, 0, 0]),
    "gelu, infinite": (lambda x: jnp.sum(jax.nn.gelu(x)), [INF], [1]),
    "gelu by erf, large": (
        lambda x: jnp.sum(jax.nn.gelu(x, approximate=False)), [6e4, -300.0], [1, 0]
    ),
    "masked entropy": (masked_entropy, [-INF, 1.0, 1.0], [0, 0, 0]),
    "log of exp of nothing": (lambda x: jnp.log(jnp.sum(jnp.exp(x))), [-INF], [0]),
}
WIDE = {  # beyond float16
    "atan2, large": (lambda x: jnp.arctan2(x[0], x[1]), [1e25, 1e25], [5e-26, -5e-26]),
    "atan2, small": (lambda x: jnp.arctan2(x[0], x[1]), [1e-25, 1e-25], [5e24, -5e24]),
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [*CASES, *WIDE])
def test_derivative_exists(name, dtype, x64):
    fun, x, expected = {**CASES, **WIDE}[name]
    if name in WIDE and dtype == "float16":
        dtype = "float32"
    tolerance = 1e-2 if jnp.dtype(dtype).itemsize == 2 else 1e-5
    x = jnp.asarray(x, dtype)
    for gradient in (fbprop.grad(fun), jax.jit(fbprop.grad(fun))):
        got = np.asarray(gradient(x), "float64")
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("fun", [jnp.var, jnp.std, lambda x: jnp.var(x, ddof=1)])
@pytest.mark.parametrize("mean", [0.0, 1e4, -3e5])
def test_variance_of_numbers_far_from_zero(fun, mean, x64):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1000) + mean, "float32")
    exact = np.asarray(jax.grad(fun)(x.astype("float64")))
    ours, theirs = (np.abs(np.asarray(m.grad(fun)(x)) - exact).max() for m in (fbprop, jax))
    assert ours <= 1.5 * theirs + 1e-7 * np.abs(exact).max()
