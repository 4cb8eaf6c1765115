"""The rule for convolutions.

Letters: N images, S spatial sizes, C input channels, O output channels, K kernel sizes, G groups.
Whatever layout the user's convolution has, the backward pass is written with arrays moved to
NHWC / HWIO first, so that what XLA sees is an ordinary convolution.
"""

from __future__ import annotations

import numpy as np
import jax.numpy as jnp
from jax import lax

from fbprop.rule import rule


def _orders(dimension_numbers):
    """Permutations that bring operand, kernel and result to N S C, K C O and N S O."""
    lhs, rhs, out = dimension_numbers
    return (
        (lhs[0], *lhs[2:], lhs[1]), (*rhs[2:], rhs[1], rhs[0]), (out[0], *out[2:], out[1]),
    )


def _back(x, order):
    return lax.transpose(x, tuple(int(i) for i in np.argsort(order)))


def _plain(x, w, strides, pads, dilation, kernel_dilation, groups, **precision):
    """x: (N, S, C), w: (K, C / groups, O) -> (N, S', O)."""
    n = x.ndim - 2
    image = (0, n + 1, *range(1, n + 1))
    numbers = lax.ConvDimensionNumbers(image, (n + 1, n, *range(n)), image)
    return lax.conv_general_dilated(
        x, w, strides, pads, dilation, kernel_dilation, numbers, groups, **precision
    )


def _spread(sizes, dilation):
    return [(s - 1) * d + 1 if s else 0 for s, d in zip(sizes, dilation)]


def _same_dtype(x, dy):
    return x if x.dtype == dy.dtype else lax.convert_element_type(x, dy.dtype)


def _input_cotangent(
    dy, w, *, x_aval, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
    feature_group_count, batch_group_count, precision=None, preferred_element_type=None,
):
    """x̄ = ȳ, dilated by the strides, ∗ the kernel flipped with its channels exchanged."""
    to_x, to_w, to_y = _orders(dimension_numbers)
    if dy.size == 0:
        return jnp.zeros(x_aval.shape, x_aval.dtype)
    dy, w = lax.transpose(dy, to_y), lax.transpose(_same_dtype(w, dy), to_w)
    n, groups = dy.ndim - 2, feature_group_count * batch_group_count
    kernel, c, o = w.shape[:n], w.shape[n], w.shape[n + 1] // groups
    spread_x = _spread([x_aval.shape[i] for i in to_x[1:-1]], lhs_dilation)
    spread_w, spread_y = _spread(kernel, rhs_dilation), _spread(dy.shape[1:-1], window_strides)
    before = [k - 1 - lo for k, (lo, _) in zip(spread_w, padding)]
    pads = [
        (b, s + k - 1 - t - b) for b, s, k, t in zip(before, spread_x, spread_w, spread_y)
    ]
    flipped = lax.rev(w, range(n)).reshape(*kernel, c, groups, o)
    exchanged = lax.transpose(flipped, (*range(n), n + 2, n + 1, n))
    dx = _plain(
        dy, exchanged.reshape(*kernel, o, groups * c), lhs_dilation, pads, window_strides,
        rhs_dilation, groups, precision=precision, preferred_element_type=preferred_element_type,
    )
    if batch_group_count > 1:  # the group was a part of the batch
        images = x_aval.shape[to_x[0]]
        parts = dx.reshape(*dx.shape[:-1], groups, c)
        dx = jnp.moveaxis(parts, -2, 0).reshape(images, *dx.shape[1:-1], c)
    return _back(dx, to_x)


def _kernel_cotangent(
    dy, x, *, w_aval, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
    feature_group_count, batch_group_count, precision=None, preferred_element_type=None,
):
    """w̄ = x ∗ ȳ, the images being summed over as if they were channels."""
    to_x, to_w, to_y = _orders(dimension_numbers)
    if dy.size == 0:
        return jnp.zeros(w_aval.shape, w_aval.dtype)
    dy, x = lax.transpose(dy, to_y), lax.transpose(_same_dtype(x, dy), to_x)
    groups = feature_group_count * batch_group_count
    spread_x, spread_y = _spread(x.shape[1:-1], lhs_dilation), _spread(dy.shape[1:-1], window_strides)
    spread_w = _spread([w_aval.shape[i] for i in to_w[:-2]], rhs_dilation)
    pads = [
        (lo, k + t - s - lo - 1)
        for (lo, _), k, t, s in zip(padding, spread_w, spread_y, spread_x)
    ]
    # Groups of channels and groups of images alike become groups of "channels": G blocks of N.
    images, c = x.shape[0] // batch_group_count, x.shape[-1] // feature_group_count
    blocks = x.reshape(batch_group_count, images, *x.shape[1:-1], feature_group_count, c)
    blocks = jnp.moveaxis(blocks, (-1, 0, -2, 1), (0, -3, -2, -1))
    dw = _plain(
        blocks.reshape(c, *x.shape[1:-1], groups * images), jnp.moveaxis(dy, 0, -2), rhs_dilation,
        pads, lhs_dilation, window_strides, groups, precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return _back(jnp.moveaxis(dw, 0, -2), to_w)


RULES = [
    rule(
        "conv_general_dilated",
        "y = x ∗ w;  x̄ = ȳ ∗ (w flipped, channels exchanged), w̄ = x ∗ ȳ summed over images.  Keeps"
        " the other operand.",
        x=_input_cotangent, w=_kernel_cotangent,
    ),
]
