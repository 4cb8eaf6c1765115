"""The rule for convolutions.

Letters: N images, S spatial sizes, C input channels, O output channels, K kernel sizes, G groups.
Whatever layout the user's convolution has, the backward pass is made of ordinary convolutions,
NHWC with HWIO kernels, of transposed arrays. The dimension numbers of automatic differentiation
take XLA's CPU compiler to a naive loop inside while bodies (jax-ml/jax#12868): a 3x3 convolution's
cotangents inside `lax.scan` cost 1/55 of `jax.grad`'s.
"""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.jaxcompat import bind
from fbprop.rule import Pullbacks

CHUNK_BYTES = 1 << 19  # of operand and result, per step of a loop over images
UNROLLED = 32  # kernel elements that are written out one by one


def formulation(x, w, numbers, strides, padding, x_dilation, groups, batch_groups):
    """How a convolution of these types is computed, forward and backward.

    "matmul": a 1x1 kernel is one; 0.55 of the time, no temporary memory.
    "taps": depthwise, on CPU: shifted multiply-adds, a few images at a time; 0.08 and 0.65.
    "convolution": everything else; on CPU the kernel's cotangent a few images at a time: 0.92-0.96
    of the time (0.02 in `lax.scan`), 0.03-0.5 of the memory.
    (float32, one core, forward and backward together, against `jax.grad`.)
    """
    kernel = [w.shape[i] for i in numbers[1][2:]]
    o, c = w.shape[numbers[1][0]], x.shape[numbers[0][1]]
    dense = all(s == 1 for s in (*strides, *x_dilation, *kernel))
    if dense and not any(map(any, padding)) and groups == batch_groups == 1:
        return "matmul"
    depthwise = groups == c == o > 1 and math.prod(kernel) <= UNROLLED
    return "taps" if depthwise and x.size and w.size else "convolution"


class Convolution(Pullbacks):
    """Pullbacks for both operands, and on CPU a forward of its own where that is faster: for the
    formulations above, and for other layouts, where XLA is slow inside loops (NCHW, 3x3: 0.08)."""

    def formulation(self, site):
        x, w = site.in_avals
        p = site.params
        return formulation(
            x, w, p["dimension_numbers"], p["window_strides"], p["padding"], p["lhs_dilation"],
            p["feature_group_count"], p["batch_group_count"],
        )

    def prepare(self, site):
        step, chosen, p = super().prepare(site), self.formulation(site), site.params
        orders = _orders(p["dimension_numbers"])
        ordinary = all(tuple(order) == tuple(range(len(order))) for order in orders)
        if p["batch_group_count"] > 1 or (chosen == "convolution" and ordinary):
            return step

        def here(x, w):
            x, w = lax.transpose(x, orders[0]), lax.transpose(w, orders[1])
            y = _convolve(
                x, w, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"],
                p["feature_group_count"], chosen, precision=p["precision"],
                preferred_element_type=site.out_avals[0].dtype,
            )
            return _back(y, orders[2])

        def as_it_stands(x, w):
            return bind(site.eqn, [x, w])[0]

        def forward(x, w):
            return [lax.platform_dependent(x, w, cpu=here, default=as_it_stands)], ()

        return step._replace(forward=forward)


def _orders(dimension_numbers):
    """Permutations that bring operand, kernel and result to N S C, K C O and N S O."""
    lhs, rhs, out = dimension_numbers
    return (
        (lhs[0], *lhs[2:], lhs[1]), (*rhs[2:], rhs[1], rhs[0]), (out[0], *out[2:], out[1]),
    )


def _back(x, order):
    return lax.transpose(x, tuple(int(i) for i in np.argsort(order)))


def _convolve(
    x, w, strides, pads, dilation, kernel_dilation, groups, chosen="convolution", **precision
):
    """x: (N, S, C), w: (K, C / groups, O) -> (N, S', O)."""
    n = x.ndim - 2
    if chosen == "matmul":
        w = w.reshape(w.shape[n:])
        y = lax.dot_general(x.reshape(-1, x.shape[-1]), w, (((1,), (0,)), ((), ())), **precision)
        return y.reshape(*x.shape[:-1], w.shape[-1])

    def ordinary(x, w):
        image = (0, n + 1, *range(1, n + 1))
        numbers = lax.ConvDimensionNumbers(image, (n + 1, n, *range(n)), image)
        return lax.conv_general_dilated(
            x, w, strides, pads, dilation, kernel_dilation, numbers, groups, **precision
        )

    def taps(x, w):
        count = _output_sizes(x, w, strides, pads, dilation, kernel_dilation)
        out = precision["preferred_element_type"] or x.dtype

        def each(x):
            views = _views(_wide(x), w.shape[:n], strides, pads, dilation, kernel_dilation, count)
            return sum(view * _wide(w)[*tap, 0] for tap, view in views).astype(out)

        return _map_images(each, x, (x.shape[0], *count, x.shape[-1]), out)

    if chosen == "taps":
        return lax.platform_dependent(x, w, cpu=taps, default=ordinary)
    return ordinary(x, w)


def _spread(sizes, dilation):
    return [(s - 1) * d + 1 if s else 0 for s, d in zip(sizes, dilation)]


def _output_sizes(x, w, strides, pads, dilation, kernel_dilation):
    n = x.ndim - 2
    spread = zip(_spread(x.shape[1:-1], dilation), _spread(w.shape[:n], kernel_dilation))
    room = [s + sum(pad) - k for (s, k), pad in zip(spread, pads)]
    return [max(r // stride + 1, 0) for r, stride in zip(room, strides)]


def _views(x, kernel, strides, pads, dilation, kernel_dilation, count):
    """Per kernel element, the part of x that it meets: (N, S', C), S' = ``count``."""
    config = [(lo, hi, d - 1) for (lo, hi), d in zip(pads, dilation)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    for tap in itertools.product(*map(range, kernel)):
        start = [k * d for k, d in zip(tap, kernel_dilation)]
        stop = [a + (m - 1) * s + 1 for a, m, s in zip(start, count, strides)]
        yield tap, lax.slice(
            x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1)
        )


def _wide(x):
    """Products of 16-bit numbers are summed in float32, as XLA's convolutions do."""
    return x.astype(jnp.float32) if x.dtype.itemsize == 2 else x


def _images_per_chunk(images, bytes_per_image):
    """The largest divisor of the number of images within CHUNK_BYTES, but 2 rather than 1: loops
    over single images, whose results XLA does not update in place, take more time and memory.
    """
    limit = max(CHUNK_BYTES // max(bytes_per_image, 1), 2)
    return max(d for d in range(1, images + 1) if images % d == 0 and d <= limit)


def _chunks(x, size):
    return x.reshape(x.shape[0] // size, size, *x.shape[1:])


def _map_images(fun, x, shape, dtype):
    """fun(x), of this shape and dtype, a few images at a time."""
    images, out_bytes = x.shape[0], math.prod(shape) * np.dtype(dtype).itemsize
    size = _images_per_chunk(images, (x.nbytes + out_bytes) // images)
    if size == images:
        return fun(x)
    if (shape, dtype) != (x.shape, x.dtype):
        return lax.map(fun, _chunks(x, size)).reshape(shape)

    def in_place(i, x):  # a fresh buffer for results would double the temporary memory
        part = fun(lax.dynamic_slice_in_dim(x, i * size, size))
        return lax.dynamic_update_slice_in_dim(x, part, i * size, 0)

    return lax.fori_loop(0, images // size, in_place, x)


def _sum_images(fun, x, dy, shape):
    """fun(x, dy), a sum over images, a few at a time; 16-bit parts are added in float32."""
    size = _images_per_chunk(x.shape[0], (x.nbytes + dy.nbytes) // x.shape[0])
    if size == x.shape[0]:
        return fun(x, dy)
    dtype = _wide(dy).dtype
    total, _ = lax.scan(
        lambda total, part: (total + fun(*part).astype(dtype), None),
        jnp.zeros(shape, dtype), (_chunks(x, size), _chunks(dy, size)),
    )
    return total.astype(dy.dtype)


def _input_cotangent(
    dy, w, *, x_aval, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
    feature_group_count, batch_group_count, precision=None, preferred_element_type=None,
):
    """x̄ = ȳ, dilated by the strides, ∗ the kernel flipped with its channels exchanged."""
    to_x, to_w, to_y = _orders(dimension_numbers)
    if dy.size == 0:
        return jnp.zeros(x_aval.shape, x_aval.dtype)
    chosen = formulation(
        x_aval, w, dimension_numbers, window_strides, padding, lhs_dilation, feature_group_count,
        batch_group_count,
    )
    dy, w = lax.transpose(dy, to_y), lax.transpose(_same_dtype(w, dy), to_w)
    n, groups = dy.ndim - 2, feature_group_count * batch_group_count
    kernel, c, o = w.shape[:n], w.shape[n], w.shape[n + 1] // groups
    spread_x = _spread([x_aval.shape[i] for i in to_x[1:-1]], lhs_dilation)
    spread_w, spread_y = _spread(kernel, rhs_dilation), _spread(dy.shape[1:-1], window_strides)
    before = [k - 1 - lo for k, (lo, _) in zip(spread_w, padding)]
    pads = [(b, s + k - 1 - t - b) for b, s, k, t in zip(before, spread_x, spread_w, spread_y)]
    exchanged = lax.transpose(w.reshape(*kernel, c, groups, o), (*range(n), n + 2, n + 1, n))
    # The flip comes last: a convolution with a reversed kernel is what cuDNN's rewrite looks for.
    flipped = lax.rev(exchanged.reshape(*kernel, o, groups * c), range(n))
    dx = _convolve(
        dy, flipped, lhs_dilation, pads, window_strides, rhs_dilation, groups, chosen,
        precision=precision, preferred_element_type=preferred_element_type,
    )
    if batch_group_count > 1:  # the group was a part of the batch
        parts = dx.reshape(*dx.shape[:-1], groups, c)
        dx = jnp.moveaxis(parts, -2, 0).reshape(x_aval.shape[to_x[0]], *dx.shape[1:-1], c)
    return _back(dx, to_x)


def _kernel_cotangent(
    dy, x, *, w_aval, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
    feature_group_count, batch_group_count, precision=None, preferred_element_type=None,
):
    """w̄ = x ∗ ȳ, the images being summed over as if they were channels."""
    to_x, to_w, to_y = _orders(dimension_numbers)
    if dy.size == 0:
        return jnp.zeros(w_aval.shape, w_aval.dtype)
    chosen = formulation(
        x, w_aval, dimension_numbers, window_strides, padding, lhs_dilation, feature_group_count,
        batch_group_count,
    )
    dy, x = lax.transpose(dy, to_y), lax.transpose(_same_dtype(x, dy), to_x)
    kernel = [w_aval.shape[i] for i in to_w[:-2]]
    options = {"precision": precision, "preferred_element_type": preferred_element_type}

    def correlate(x, dy):
        return _correlate(
            x, dy, kernel, window_strides, padding, lhs_dilation, rhs_dilation,
            feature_group_count, batch_group_count, **options,
        )

    def taps(x, dy):
        count, dtype, dy = dy.shape[1:-1], dy.dtype, _wide(dy)
        views = _views(_wide(x), kernel, window_strides, padding, lhs_dilation, rhs_dilation, count)
        sums = [jnp.sum(view * dy, range(dy.ndim - 1)) for _, view in views]
        return jnp.stack(sums).reshape(*kernel, 1, -1).astype(dtype)

    if chosen == "matmul":
        x, dy = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
        dw = lax.dot_general(x, dy, (((0,), (0,)), ((), ())), **options)
        dw = dw.reshape(*kernel, *dw.shape)
    elif batch_group_count > 1:
        dw = correlate(x, dy)
    else:
        each = taps if chosen == "taps" else correlate
        shape = [w_aval.shape[i] for i in to_w]
        dw = lax.platform_dependent(
            x, dy, cpu=lambda x, dy: _sum_images(each, x, dy, shape), default=correlate
        )
    return _back(dw, to_w)


def _correlate(
    x, dy, kernel, strides, padding, dilation, kernel_dilation, groups, batch_groups, **options
):
    """(N, S, C), (N, S', O) -> (K, C / G, O) by an ordinary convolution of C N-channel images."""
    spread_x, spread_y = _spread(x.shape[1:-1], dilation), _spread(dy.shape[1:-1], strides)
    pads = [
        (lo, k + t - s - lo - 1)
        for (lo, _), k, t, s in zip(padding, _spread(kernel, kernel_dilation), spread_y, spread_x)
    ]
    # Groups of channels and groups of images alike become groups of "channels": G blocks of N.
    images, c = x.shape[0] // batch_groups, x.shape[-1] // groups
    blocks = x.reshape(batch_groups, images, *x.shape[1:-1], groups, c)
    blocks = jnp.moveaxis(blocks, (-1, 0, -2, 1), (0, -3, -2, -1))
    dw = _convolve(
        blocks.reshape(c, *x.shape[1:-1], -1), jnp.moveaxis(dy, 0, -2), kernel_dilation, pads,
        dilation, strides, groups * batch_groups, **options,
    )
    return jnp.moveaxis(dw, 0, -2)


def _same_dtype(x, dy):
    return x if x.dtype == dy.dtype else lax.convert_element_type(x, dy.dtype)


RULES = [
    Convolution(
        "conv_general_dilated",
        "y = x ∗ w;  x̄ = ȳ ∗ (w flipped, channels exchanged), w̄ = x ∗ ȳ summed over images.  Keeps"
        " the other operand.",
        {"x": _input_cotangent, "w": _kernel_cotangent},
    ),
]
