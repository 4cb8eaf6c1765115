"""Pooling over windows of images [B, *spatial, C], and flattening."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.core.precision import at_least_float32
from fbprop.nn.layer import Layer, function
from fbprop.nn.shapes import (
    check_fits,
    check_image,
    check_sequence,
    per_dimension,
    sequence_mask,
)


def max_pool(window: int | tuple[int, ...] = 2, *, stride=None, padding="VALID",
             name: str = "max_pool") -> Layer:
    """The largest value in each window; padding never wins.

    Args:
      window: an int k for k x k images; a tuple of 1, 2 or 3 for that many dimensions.
      stride: an int for all dimensions, or one each. Default: the window, so that none overlap.
      padding: ``"VALID"``, ``"SAME"``, or ((low, high), ...) per spatial dimension.

    Raises:
      ValueError: the input is not [B, *spatial, C]; a tuple has the wrong length; the window is
        larger than the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> nn.max_pool(2).apply({}, jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel().tolist()
      [5.0, 7.0, 13.0, 15.0]
    """

    def lowest(dtype):
        return -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min

    return _pool(
        window, stride, padding, name,
        lambda x, reduce: reduce(x, np.asarray(lowest(x.dtype), x.dtype), lax.max),
    )


def avg_pool(window: int | tuple[int, ...] = 2, *, stride=None, padding="VALID",
             count_include_pad: bool = True, name: str = "avg_pool") -> Layer:
    """The mean of each window, added up in float32 at least.

    Args:
      window, stride, padding: as for `max_pool`.
      count_include_pad: whether padding counts as zeros, or not at all.

    Raises:
      ValueError: the input is not [B, *spatial, C]; a tuple has the wrong length.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> nn.avg_pool(2).apply({}, jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel().tolist()
      [2.5, 4.5, 10.5, 12.5]
    """

    def mean(x, reduce):
        wide = at_least_float32(x)
        zero, number = np.zeros((), wide.dtype), math.prod(_sizes(window))
        if not count_include_pad:
            number = reduce(jnp.ones((1, *x.shape[1:-1], 1), wide.dtype), zero, lax.add)
            number = jnp.maximum(number, 1)  # of a window that is all padding the mean is 0
        y = reduce(wide, zero, lax.add) / number
        return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else y

    return _pool(window, stride, padding, name, mean)


def global_avg_pool(*, name: str = "global_avg_pool") -> Layer:
    """The mean over all positions, [B, *spatial, C] -> [B, C], in float32 at least.

    Of padded sequences [B, T, C], with ``apply(..., lengths=lengths)``, over the real steps; 0 for
    one that has none.

    Raises:
      ValueError: the input is not [B, *spatial, C]; lengths for more than one spatial dimension.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> x = jnp.array([[[2.0], [4.0], [9.0]]])
      >>> nn.global_avg_pool().apply({}, x, lengths=jnp.array([2])).tolist()
      [[3.0]]
    """

    def apply(params, x, *, lengths):
        wide = at_least_float32(x)
        if lengths is None:
            check_image(name, x, max(1, x.ndim - 2))
            return jnp.mean(wide, axis=tuple(range(1, x.ndim - 1))).astype(x.dtype)
        check_sequence(name, x)
        real = sequence_mask(lengths, x.shape[1])[..., None]
        total = jnp.sum(jnp.where(real, wide, 0), axis=1)
        return (total / jnp.maximum(lengths, 1).astype(wide.dtype)[:, None]).astype(x.dtype)

    return Layer(lambda key, x: {}, apply, name)


def flatten(*, name: str = "flatten") -> Layer:
    """[B, ...] -> [B, product of the rest].

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> nn.flatten().apply({}, jnp.ones((2, 3, 5, 7))).shape
      (2, 105)
    """
    return function(lambda x: x.reshape(x.shape[0], math.prod(x.shape[1:])), name)


def _sizes(window):
    return (window,) * 2 if isinstance(window, int) else tuple(window)


def _pool(window, stride, padding, name, of):
    """A layer computing ``of(x, reduce)``, ``reduce(x, identity, operation)`` over windows."""
    sizes = _sizes(window)
    n = len(sizes)
    strides = sizes if stride is None else per_dimension(stride, n, f"{name}'s stride")
    pads = padding if isinstance(padding, str) else ((0, 0), *padding, (0, 0))

    def reduce(x, identity, operation):
        return lax.reduce_window(x, identity, operation, (1, *sizes, 1), (1, *strides, 1), pads)

    def pool(x):
        check_image(name, x, n)
        y = of(x, reduce)
        check_fits(name, x, y, sizes)
        return y

    return function(pool, name)
