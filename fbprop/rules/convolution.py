"""The rule for convolutions.

Letters: N images, S spatial sizes, C input channels, O output channels, K kernel sizes, G groups.
Whatever layout the user's convolution has, the backward pass is made of ordinary convolutions,
NHWC with HWIO kernels, of transposed arrays. The dimension numbers of automatic differentiation
take XLA's CPU compiler to a naive loop inside while bodies (jax-ml/jax#12868): there a 3x3
convolution's cotangents cost 0.02 of `jax.grad`'s.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.core.devices import by_devices, by_platform, in_words
from fbprop.core.fallback import jax_step
from fbprop.core.jaxcompat import bind, explicit_sharding, varying_like
from fbprop.core.precision import at_least_float32
from fbprop.core.rule import Pair

CHUNK_BYTES = 1 << 19  # of operand and result, per step of a loop over images
UNROLLED = 32  # kernel elements that are written out one by one


class Geometry(NamedTuple):
    """How a kernel moves over images, per spatial dimension, and how channels are grouped."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int = 1


def formulation(x_shape, w_shape, geometry, batch_groups=1):
    """How a convolution (N, S, C) with (K, C / G, O) is computed, forward and backward.

    "matmul": a 1x1 kernel is one; 0.55 of the time, no temporary memory.
    "taps": depthwise, on CPU: shifted multiply-adds, a few images at a time; 0.08 and 0.65.
    "convolution": everything else; on CPU the kernel's cotangent a few images at a time: 0.66-0.99
    of the time on jax 0.10, 0.8-1.04 on 0.12 (0.02 in `lax.scan`), 0.13-0.6 of the memory.
    (float32, one core, forward and backward together, against `jax.grad`.)
    """
    kernel, groups = w_shape[:-2], geometry.groups
    still = all(s == 1 for s in (*geometry.strides, *geometry.dilation, *kernel))
    if still and not any(map(any, geometry.pads)) and groups == batch_groups == 1:
        return "matmul"
    depthwise = groups == x_shape[-1] == w_shape[-1] > 1 and math.prod(kernel) <= UNROLLED
    return "taps" if depthwise else "convolution"


class Convolution(Pair):
    """Cotangents of both operands, and on CPU a forward of its own where that is faster: for the
    formulations above, and for other layouts, where XLA is slow inside loops (NCHW, 3x3: 0.08).
    """

    def formulation(self, site):
        if _in_types(site):
            return "jax.vjp"
        problem = Problem(site)
        if site.platform is None or problem.chosen == "matmul" or problem.batch_groups > 1:
            return problem.chosen
        forms = {"taps": "taps", "convolution": "convolution, w̄ some images at a time"}
        return in_words(site.platform, forms[problem.chosen], "cpu", "convolution")

    def prepare(self, site):
        if _in_types(site):
            return jax_step(site)
        step, problem = super().prepare(site), Problem(site)
        as_jax = problem.chosen == "convolution" and problem.ordinary
        if problem.batch_groups > 1 or as_jax or _is_empty(site):
            return step

        def forward(x, w):
            as_it_stands = lambda x, w: bind(site.eqn, [x, w])[0]
            y = by_platform(x, w, cpu=problem.forward, default=as_it_stands)
            return [y], ()

        return step._replace(forward=forward)


def _in_types(site):
    """Whether shardings are part of the types: what is convolved then has one to be chosen."""
    return any(map(explicit_sharding, site.in_avals))


class Problem:
    """One equation, its operands in the order N S C and K C O."""

    def __init__(self, site):
        p, (x, w) = site.params, site.in_avals
        lhs, rhs, out = p["dimension_numbers"]
        self.to_x, self.to_w = (lhs[0], *lhs[2:], lhs[1]), (*rhs[2:], rhs[1], rhs[0])
        self.to_y = (out[0], *out[2:], out[1])
        self.x, self.w = ([a.shape[i] for i in to] for a, to in ((x, self.to_x), (w, self.to_w)))
        self.batch_groups = p["batch_group_count"]
        self.geometry = Geometry(
            p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"],
            p["feature_group_count"],
        )
        self.chosen = formulation(self.x, self.w, self.geometry, self.batch_groups)
        self.types = x.dtype, w.dtype
        self.options = {
            "precision": p["precision"], "preferred_element_type": p["preferred_element_type"],
        }

    @property
    def ordinary(self):
        orders = self.to_x, self.to_w, self.to_y
        return all(tuple(order) == tuple(range(len(order))) for order in orders)

    def forward(self, x, w):
        x, w = lax.transpose(x, self.to_x), lax.transpose(w, self.to_w)
        return _back(_convolve(x, w, self.geometry, self.chosen, **self.options), self.to_y)

    def cotangent(self, i, dy, other):
        """Of operand i, in its type."""
        d = (self.x_cotangent, self.w_cotangent)[i](dy, other)
        return d.astype(self.types[i])

    def x_cotangent(self, dy, w):
        """x̄ = ȳ, dilated by the strides, ∗ the kernel flipped with its channels exchanged."""
        dy = lax.transpose(dy, self.to_y)
        w = lax.transpose(lax.convert_element_type(w, dy.dtype), self.to_w)
        n, g, groups = dy.ndim - 2, self.geometry, self.geometry.groups * self.batch_groups
        kernel, c, o = w.shape[:n], w.shape[n], w.shape[n + 1] // groups
        sizes = zip(
            _dilated(self.x[1:-1], g.dilation), _dilated(kernel, g.kernel_dilation),
            _dilated(dy.shape[1:-1], g.strides), g.pads,
        )
        pads = tuple((k - 1 - lo, s - t + lo) for s, k, t, (lo, _) in sizes)
        w = lax.transpose(w.reshape(*kernel, c, groups, o), (*range(n), n + 2, n + 1, n))
        # The flip comes last: a convolution with a reversed kernel is what XLA hands to cuDNN.
        w = lax.rev(w.reshape(*kernel, o, groups * c), range(n))
        turned = Geometry(g.dilation, pads, g.strides, g.kernel_dilation, groups)
        dx = _convolve(dy, w, turned, self.chosen, **self.options)
        if self.batch_groups > 1:  # the group was a part of the batch
            dx = jnp.moveaxis(dx.reshape(*dx.shape[:-1], groups, c), -2, 0).reshape(self.x)
        return _back(dx, self.to_x)

    def w_cotangent(self, dy, x):
        """w̄ = x ∗ ȳ, the images being summed over as if they were channels."""
        dy = lax.transpose(dy, self.to_y)
        x = lax.transpose(lax.convert_element_type(x, dy.dtype), self.to_x)
        if self.chosen == "matmul":
            pixels = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
            dw = lax.dot_general(*pixels, (((0,), (0,)), ((), ())), **self.options)
            return _back(dw.reshape(self.w), self.to_w)
        if self.batch_groups > 1:
            return _back(self._correlate(x, dy), self.to_w)
        # Convolutions of fewer than 8 "channels" are slow: 4 images 1.15, 2 images 1.5 (jax 0.12).
        each, least = (
            (self._correlate_taps, 2) if self.chosen == "taps" else (self._correlate, 8)
        )
        dw = by_platform(
            x, dy, cpu=lambda x, dy: _sum_images(each, x, dy, self.w, least),
            default=self._correlate,
        )
        return _back(dw, self.to_w)

    def _correlate(self, x, dy):
        """(N, S, C), (N, S', O) -> (K, C / G, O): an ordinary convolution of C N-channel images."""
        g, parts = self.geometry, self.batch_groups
        sizes = zip(
            _dilated(x.shape[1:-1], g.dilation), _dilated(self.w[:-2], g.kernel_dilation),
            _dilated(dy.shape[1:-1], g.strides), g.pads,
        )
        pads = tuple((lo, k + t - s - lo - 1) for s, k, t, (lo, _) in sizes)
        # Groups of channels and groups of images alike become groups of "channels": G times N.
        images, c = x.shape[0] // parts, x.shape[-1] // g.groups
        x = x.reshape(parts, images, *x.shape[1:-1], g.groups, c)
        x = jnp.moveaxis(x, (-1, 0, -2, 1), (0, -3, -2, -1)).reshape(c, *x.shape[2:-2], -1)
        turned = Geometry(g.kernel_dilation, pads, g.dilation, g.strides, g.groups * parts)
        return jnp.moveaxis(_convolve(x, jnp.moveaxis(dy, 0, -2), turned, **self.options), 0, -2)

    def _correlate_taps(self, x, dy):
        views = _views(at_least_float32(x), self.w[:-2], self.geometry, dy.shape[1:-1])
        sums = [jnp.sum(view * at_least_float32(dy), range(dy.ndim - 1)) for view in views]
        return jnp.stack(sums).reshape(self.w).astype(dy.dtype)


def _back(x, order):
    return lax.transpose(x, tuple(int(i) for i in np.argsort(order)))


def _dilated(sizes, dilation):
    return [(s - 1) * d + 1 if s else 0 for s, d in zip(sizes, dilation)]


def _convolve(x, w, geometry, chosen="convolution", **options):
    """x: (N, S, C), w: (K, C / G, O) -> (N, S', O)."""
    n = x.ndim - 2
    if chosen == "matmul":
        pixels, w = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[n:])
        y = lax.dot_general(pixels, w, (((1,), (0,)), ((), ())), **options)
        return y.reshape(*x.shape[:-1], w.shape[-1])

    def ordinary(x, w):
        image = (0, n + 1, *range(1, n + 1))
        numbers = lax.ConvDimensionNumbers(image, (n + 1, n, *range(n)), image)
        return lax.conv_general_dilated(x, w, *geometry[:4], numbers, geometry.groups, **options)

    def taps(x, w):
        return _convolve_taps(x, w, geometry, options["preferred_element_type"] or x.dtype)

    return by_platform(x, w, cpu=taps, default=ordinary) if chosen == "taps" else ordinary(x, w)


def _convolve_taps(x, w, geometry, dtype):
    n, g = x.ndim - 2, geometry
    sizes = zip(
        _dilated(x.shape[1:-1], g.dilation), _dilated(w.shape[:n], g.kernel_dilation), g.pads,
        g.strides,
    )
    count = [max((s + lo + hi - k) // stride + 1, 0) for s, k, (lo, hi), stride in sizes]

    def each(x):
        views = _views(at_least_float32(x), w.shape[:n], g, count)
        taps = at_least_float32(w).reshape(-1, *(1,) * (x.ndim - 1), w.shape[-1])
        return sum(v * t for v, t in zip(views, taps)).astype(dtype)

    return _map_images(each, x, (x.shape[0], *count, x.shape[-1]), dtype)


def _views(x, kernel, geometry, count):
    """Per kernel element, the part of x that it meets: (N, S', C), S' = ``count``."""
    config = [(lo, hi, d - 1) for (lo, hi), d in zip(geometry.pads, geometry.dilation)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    strides = (1, *geometry.strides, 1)
    for tap in itertools.product(*map(range, kernel)):
        start = [k * d for k, d in zip(tap, geometry.kernel_dilation)]
        stop = [a + (m - 1) * s + 1 for a, m, s in zip(start, count, geometry.strides)]
        yield lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), strides)


def _images_per_chunk(images, bytes_per_image, least):
    """The largest divisor of the number of images within CHUNK_BYTES or within ``least``."""
    limit = max(CHUNK_BYTES // max(bytes_per_image, 1), least)
    return max(d for d in range(1, images + 1) if images % d == 0 and d <= limit)


def _chunks(x, size):
    return x.reshape(x.shape[0] // size, size, *x.shape[1:])


def _map_images(fun, x, shape, dtype):
    """fun(x), of this shape and dtype, a few images at a time."""
    images, out_bytes = x.shape[0], math.prod(shape) * np.dtype(dtype).itemsize
    # XLA does not update the results of a loop over single images in place: 2.5 times the memory.
    size = _images_per_chunk(images, (x.nbytes + out_bytes) // images, least=2)
    if size == images:
        return fun(x)
    if (shape, dtype) != (x.shape, x.dtype):
        return lax.map(fun, _chunks(x, size)).reshape(shape)

    def in_place(i, x):  # a fresh buffer for the results would double the temporary memory
        part = fun(lax.dynamic_slice_in_dim(x, i * size, size))
        return lax.dynamic_update_slice_in_dim(x, part, i * size, 0)

    return lax.fori_loop(0, images // size, in_place, x)


def _sum_images(fun, x, dy, shape, least):
    """fun(x, dy), of this shape, a sum over images, a few at a time."""
    size = _images_per_chunk(x.shape[0], (x.nbytes + dy.nbytes) // x.shape[0], least)
    if size == x.shape[0]:
        return fun(x, dy)

    # Slices of x and ȳ as they are: as the operands of a scan, reshaped, they would be copied.
    def add(i, total):
        part = (lax.dynamic_slice_in_dim(a, i * size, size) for a in (x, dy))
        return total + at_least_float32(fun(*part))

    zero = varying_like(jnp.zeros(shape, at_least_float32(dy).dtype), x, dy)
    total = lax.fori_loop(0, x.shape[0] // size, add, zero)
    return total.astype(dy.dtype)


def _is_empty(site):
    return any(a.size == 0 for a in (*site.in_avals, *site.out_avals))


def _keep(site):
    return tuple(i for i in (0, 1) if site.active[1 - i])


def _backward(site, kept, dy):
    if _is_empty(site):  # sums of no terms
        return [jnp.zeros(a.shape, a.dtype) for a in site.in_avals]
    kept = dict(zip(_keep(site), kept))
    return [cotangent(site, i, dy, kept[1 - i]) if site.active[i] else None for i in (0, 1)]


def cotangent(site, i, dy, other):
    """Of operand i, given the other one."""
    return by_devices(
        dy, other, one=functools.partial(Problem(site).cotangent, i),
        several=functools.partial(_transposed, site, i),
    )


def _transposed(site, i, dy, other):
    """The cotangent of operand i as automatic differentiation has it.

    It leaves images, channels and their sums where they are; ours, of pixels and images in other
    places, sends 7 arrays between devices that share out channels where this one sends 3.
    """
    def convolved(operand):
        return bind(site.eqn, [operand, other] if i == 0 else [other, operand])[0]

    return jax.linear_transpose(convolved, site.in_avals[i])(dy)[0]


RULES = [
    Convolution(
        "conv_general_dilated",
        "y = x ∗ w;  x̄ = ȳ ∗ (w flipped, channels exchanged), w̄ = x ∗ ȳ summed over images.  Keeps"
        " the other operand.",
        _backward, keep=_keep, keeps="the other operand",
    ),
]
