"""The Pallas kernel of `fbprop.ops.linear_cross_entropy`, interpreted, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import ops
from fbprop.core.precision import wide_dtype
from fbprop.ops.linear_cross_entropy import Form, _by_chunks
from fbprop.ops.softmax_tiles import COLUMNS, LANES, ByTiles, refuses


def drawn(n, d, v, dtype):
    """Numbers that bfloat16 holds, labels on both sides of a tile's end, a row that is not read."""
    rng = np.random.default_rng(0)
    x, w, b = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16).astype(dtype)
               for s in ((n, d), (d, v), (v,)))
    share = jnp.asarray(rng.uniform(0.5, 1.0, n), wide_dtype(dtype)).at[1].set(0)
    return x.at[1].set(jnp.nan), w, b, share, jnp.asarray(rng.integers(0, v, n)).at[0].set(v - 1)


def exactly(form, x, w, b, share, labels):
    """Losses times share, their sum's gradients: NumPy, float64."""
    x, w, share = (np.asarray(a, np.float64) for a in (x, w, share))
    x = np.where(share[:, None] == 0, 0, x)
    z = x @ w + (0 if b is None else np.asarray(b, np.float64))
    top = z.max(1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(1, keepdims=True))
    target = form.smoothing / z.shape[1] + (1 - form.smoothing) * (
        np.arange(z.shape[1]) == np.asarray(labels)[:, None])
    losses = share * (lse[:, 0] - (target * z).sum(1) + form.z_loss * lse[:, 0] ** 2)
    dz = share[:, None] * (np.exp(z - lse) * (1 + 2 * form.z_loss * lse) - target)
    return losses, dz @ w.T, x.T @ dz, dz.sum(0)


def interpreted(form, x, w, b, share, labels, wants=(True,) * 3, size=1024):
    return _by_chunks(ByTiles(form, wants, w, b, interpret=True), size, w, b, x, share, labels,
                      share)


@pytest.mark.parametrize(("sizes", "dtype", "form", "size"), [
    ((1100, 5, COLUMNS + 88), jnp.float32, Form(0.1, 1e-2), 2048),  # rows of a tile and a rest
    # Two chunks; one tile more than a block has lanes.
    ((8, 2, LANES * COLUMNS + 3), jnp.bfloat16, Form(), 4),
], ids=["f32", "wide"])
def test_tiles_are_the_whole(sizes, dtype, form, size):
    operands = x, w, b, *_ = drawn(*sizes, dtype)
    found = jax.jit(lambda *o: interpreted(form, *o, size=size))(*operands)
    for got, wanted, like in zip(found, exactly(form, *operands), (None, x, w, b)):
        assert like is None or got.dtype == like.dtype
        most = 1e-5 if like is None else 1e-2  # ours multiplies 8 digits of e and of z̄
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=most,
                                   atol=most * abs(wanted).max())


def test_only_what_is_asked_for_and_what_is_infinite():
    """Without gradients, without a bias; a class of bias −inf; a label outside; large logits."""
    x, w, b, share, labels = drawn(6, 3, 700, jnp.float32)
    b = b.at[COLUMNS:].set(-jnp.inf)  # a tile of nothing
    labels = jnp.minimum(labels, COLUMNS - 1)

    def every(x, w):
        alone = interpreted(Form(), x, w, None, share, labels.at[2].set(700), (False,) * 3)[0]
        return alone, interpreted(Form(), 2.0**13 * x, w, b, share, labels)[:3]

    alone, (losses, dx, dw) = jax.jit(every)(x, w)
    expected = exactly(Form(), x, w, None, share, labels)[0]
    np.testing.assert_allclose(alone[3:], expected[3:], rtol=1e-5)
    np.testing.assert_array_equal(jnp.isnan(alone), np.arange(6) == 2)
    few = exactly(Form(), 2.0**13 * x, w[:, :COLUMNS], b[:COLUMNS], share, labels)
    np.testing.assert_allclose(losses, few[0], rtol=1e-5)
    np.testing.assert_allclose(dx, few[1], atol=1e-2)
    np.testing.assert_allclose(dw[:, :COLUMNS], few[2], atol=1e-2 * abs(few[2]).max())
    assert (dw[:, COLUMNS:] == 0).all()


def test_is_what_a_tpu_runs():
    """In the program for a TPU, and nowhere else; `explain` says so."""
    x, w = jnp.ones((20, 8), jnp.bfloat16), jnp.ones((8, 600), jnp.bfloat16)
    loss = lambda x, w: ops.linear_cross_entropy(x, w, jnp.arange(20))
    traced = jax.jit(fbprop.grad(loss, (0, 1))).trace(x, w)
    for platform, there in (("tpu", True), ("cpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" in text) == there
        said = str(fbprop.explain(loss, x, w, argnums=(0, 1), platform=platform))
        assert ("by a Pallas kernel" in said) == there


@pytest.mark.parametrize(("shape", "classes", "dtype", "cap", "why"), [
    ((20, 8), 600, jnp.float16, None, "float32 and bfloat16, not float16"),
    ((20, 8), 600, jnp.float32, 5.0, "soft_cap's slope needs the logits"),
    ((20, 8), 100, jnp.float32, None, "512 classes or more"),
    ((20, 2), 600, jnp.float32, None, ""),
    ((20, 4096), 600, jnp.float32, None, "4096 features do not fit"),
])
def test_says_why_not(shape, classes, dtype, cap, why):
    types = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((shape[1], classes), dtype)
    said = refuses(*types, cap)
    assert why in said
    assert bool(said) == bool(why)
    if not why:
        with jax.default_matmul_precision("float32"):
            assert "more exact" in refuses(*types, cap)
