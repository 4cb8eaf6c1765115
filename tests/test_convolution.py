"""What rows of tests/cases/convolution.py cannot say: how a convolution is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop.rules import convolution

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def arrays(*shapes, dtype="float64"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def conv(numbers=NHWC, strides=(1, 1), padding="SAME", **options):
    return lambda x, w: lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, **options
    )


def value_and_cotangents(vjp, fun, *primals):
    y, pullback = vjp(fun, *primals)
    return y, pullback(jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), y.dtype))


def assert_like_jax(fun, *primals, rtol=1e-12):
    got, expected = (
        jax.jit(lambda *p, vjp=vjp: value_and_cotangents(vjp, fun, *p))(*primals)
        for vjp in (fbprop.vjp, jax.vjp)
    )

    def same(a, b):
        assert a.dtype == b.dtype
        scale = max(np.abs(b).max(), 1e-30) if b.size else 1.0
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), 0, rtol * scale)

    jax.tree.map(same, got, expected)


@pytest.mark.parametrize(
    ("x", "w", "options", "expected"),
    [
        ((2, 5, 3, 3), (1, 1, 3, 2), {}, "matmul"),
        ((2, 5, 3, 3), (1, 1, 3, 2), {"strides": (2, 1)}, "convolution"),
        ((2, 5, 3, 3), (1, 1, 3, 2), {"padding": ((1, 0), (0, 0))}, "convolution"),
        ((2, 5, 3, 3), (3, 3, 1, 3), {"feature_group_count": 3}, "taps"),
        ((2, 5, 3, 3), (3, 3, 1, 6), {"feature_group_count": 3}, "convolution"),
        ((2, 5, 3, 3), (7, 5, 1, 3), {"feature_group_count": 3}, "convolution"),
        ((2, 5, 3, 3), (3, 3, 3, 3), {}, "convolution"),
    ],
)
def test_formulation(x, w, options, expected):
    _, pullback = fbprop.vjp(conv(**options), *arrays(x, w, dtype="float32"))
    ((site, rule, _),) = filter(None, pullback.plan.steps)
    assert rule.formulation(site) == expected


@pytest.mark.parametrize("numbers", [NHWC, NCHW])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_few_images_at_a_time(numbers, groups, monkeypatch, x64):
    monkeypatch.setattr(convolution, "CHUNK_BYTES", 1)
    x, w = arrays((14, 5, 7, 3), (3, 2, 3 // groups, 3))
    if numbers == NCHW:
        x, w = jnp.transpose(x, (0, 3, 1, 2)), jnp.transpose(w, (3, 2, 0, 1))
    fun = conv(numbers, feature_group_count=groups)
    loops = str(jax.make_jaxpr(lambda *p: value_and_cotangents(fbprop.vjp, fun, *p))(x, w))
    assert "scan[" in loops
    assert_like_jax(fun, x, w)
    assert_like_jax(conv(numbers, (2, 1), feature_group_count=groups), x, w)


@pytest.mark.parametrize("groups", [1, 3])
def test_16_bit_sums_over_many_chunks_are_exact_to_rounding(groups, monkeypatch):
    monkeypatch.setattr(convolution, "CHUNK_BYTES", 1)
    x, w = jnp.ones((346, 1, 1, 3), "bfloat16"), jnp.ones((2, 2, 3 // groups, 3), "bfloat16")
    dw = fbprop.grad(lambda w: jnp.sum(conv(feature_group_count=groups)(x, w)))(w)
    np.testing.assert_array_equal(np.asarray(dw[0, 0], float), 346)


@pytest.mark.parametrize("kernel", [(3, 3, 3, 2), (1, 1, 3, 2)])
def test_result_in_a_wider_type(kernel):
    x, w = arrays((2, 5, 7, 3), kernel, dtype="bfloat16")
    assert_like_jax(conv(preferred_element_type=jnp.float32), x, w, rtol=1e-2)


def test_no_room_for_the_kernel():
    x, w = arrays((2, 2, 3, 3), (3, 3, 3, 2), dtype="float32")
    _, pullback = fbprop.vjp(conv(padding="VALID"), x, w)
    dx, dw = pullback(jnp.zeros((2, 0, 1, 2)))
    assert (dx.shape, dw.shape) == (x.shape, w.shape)
    assert not dx.any()
    assert not dw.any()


@pytest.mark.parametrize(
    ("w", "groups"), [((3, 3, 4, 4), 1), ((3, 3, 1, 4), 4), ((1, 1, 4, 4), 1)]
)
@pytest.mark.parametrize("numbers", [NHWC, NCHW])
def test_lowers_for_every_platform(w, groups, numbers):
    x, w = jnp.ones((2, 4, 4, 4)), jnp.ones(w)
    w = w if numbers == NHWC else jnp.transpose(w, (3, 2, 0, 1))
    fun = conv(numbers, feature_group_count=groups)
    step = jax.jit(lambda x, w: value_and_cotangents(fbprop.vjp, fun, x, w))
    platforms = ("cpu", "cuda", "tpu")
    assert jax.export.export(step, platforms=platforms)(x, w).platforms == platforms
