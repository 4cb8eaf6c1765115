"""Pooling where JAX's own gradient is missing or wrong, against windows gathered one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from cases.case import apart
from fbprop.rules import window


def by_hand(x, size, strides, padding, dilation):
    """The maximum of each window, from as many slices as a window has offsets."""
    x = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), [(lo, hi, 0) for lo, hi in padding])
    extent = [(n - 1) * d + 1 for n, d in zip(size, dilation)]
    views = []
    for offset in itertools.product(*map(range, size)):
        start = [k * d for k, d in zip(offset, dilation)]
        stop = [n - e + a + 1 for n, e, a in zip(x.shape, extent, start)]
        views.append(lax.slice(x, start, stop, strides))
    return jnp.max(jnp.stack(views), 0)


@pytest.mark.parametrize(
    ("size", "strides", "padding", "dilation"),
    [
        ((2, 3), (1, 2), ((0, 0), (1, 2)), (2, 3)),  # jax 0.10: no gradient with window dilation
        ((7, 5), (1, 1), ((4, 5), (3, 3)), (1, 2)),  # the same, windows of more than 32 offsets
        ((2, 2), (2, 1), ((-2, -1), (1, -1)), (1, 1)),  # jax 0.10: fails on negative padding
        ((3, 2), (3, 1), ((0, 0), (0, 0)), (1, 5)),  # no room for a window
    ],
)
def test_windows_that_jax_cannot_differentiate(size, strides, padding, dilation, x64):
    x = jnp.asarray(apart(7, 5)(np.random.default_rng(0)))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(99))

    def loss(pool):
        def scalar(x):
            y = pool(x).reshape(-1)
            return jnp.vdot(y * y, weights[: y.size])

        return scalar

    def pool(x):
        return lax.reduce_window(
            x, -np.inf, lax.max, size, strides, padding, window_dilation=dilation
        )

    @jax.jit
    def both(x):
        plain = loss(lambda x: by_hand(x, size, strides, padding, dilation))
        return fbprop.value_and_grad(loss(pool))(x), jax.value_and_grad(plain)(x)

    got, expected = both(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), got, expected)


@pytest.mark.parametrize("size", [3, 41])
def test_nan_is_the_extremum_and_gets_the_gradient(size):
    x = jnp.ones(41).at[1].set(jnp.nan)
    pool = lambda x: lax.reduce_window(x, -np.inf, lax.max, (size,), (size,), "VALID")
    y, pullback = fbprop.vjp(pool, x)
    np.testing.assert_array_equal(y, pool(x))
    assert np.isnan(y[0])
    np.testing.assert_array_equal(pullback(jnp.ones_like(y))[0][: size], np.eye(size)[1])


def test_a_tpu_scatters_where_the_operand_is_at_hand(monkeypatch, x64):
    x, w = (jnp.asarray(np.random.default_rng(i).standard_normal((5, 7))) for i in (0, 1))
    pool = lambda x: lax.reduce_window(x, -np.inf, lax.max, (3, 2), (2, 2), "SAME")
    loss = lambda x: jnp.sum(jnp.sin(pool(x * w)))
    looped = lambda x: lax.scan(lambda c, x: (c + loss(x), None), 0.0, x[None])[0]
    for fun, platform, at_hand in (loss, "tpu", 1), (loss, "cuda", 0), (looped, "tpu", 0):
        gradient = jax.jit(fbprop.grad(fun)).trace(x)
        text = gradient.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("select_and_scatter") == at_hand, platform
    assert "select-and-scatter" in str(fbprop.explain(loss, x, platform="tpu"))
    monkeypatch.setattr(window, "at_lowering", lambda *xs, tpu, **_: tpu(*xs))
    found = jax.jit(fbprop.grad(loss))(x)
    np.testing.assert_allclose(found, jax.jit(jax.grad(loss))(x), rtol=1e-13, atol=1e-15)
