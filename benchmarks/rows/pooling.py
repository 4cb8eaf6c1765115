"""Max and average pooling, NHWC, by `lax.reduce_window`."""

import jax.numpy as jnp
from jax import lax

from benchmarks.row import operation, row

SIZES = {
    "smoke": [(2, 8, 8, 4)],
    "small": [(8, 32, 32, 64)],
    "full": [(64, 32, 32, 64), (32, 56, 56, 64), (128, 28, 28, 16)],
}


def max_pool(x, window, stride):
    """Largest element of each window of NHWC images, no padding."""
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID"
    )


def average_pool(x, window, stride):
    """Mean of each window of NHWC images, no padding."""
    dims, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, 0.0, lax.add, dims, strides, "VALID") / window**2


def _row(pool, window, x):
    # At least: read x, write y, read the cotangent of y, write that of x.
    smaller = x.nbytes // 4
    return operation(lambda x: pool(x, window, 2), [x], bytes=2 * (x.nbytes + smaller))


@row(**SIZES)
def max_pool_2x2(draw, B, H, W, C):
    return _row(max_pool, 2, draw.normal(B, H, W, C))


@row(**SIZES)
def max_pool_3x3_stride_2(draw, B, H, W, C):
    return _row(max_pool, 3, draw.normal(B, H, W, C))


@row(**SIZES)
def average_pool_2x2(draw, B, H, W, C):
    return _row(average_pool, 2, draw.normal(B, H, W, C))


@row(**SIZES)
def average_pool_3x3_stride_2(draw, B, H, W, C):
    return _row(average_pool, 3, draw.normal(B, H, W, C))
