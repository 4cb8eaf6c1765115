"""Rules for operations that move elements without changing them."""

from __future__ import annotations

import numpy as np
import jax.numpy as jnp
from jax import lax

from fbprop.rule import linear, pair


def _broadcast_in_dim(dy, *, broadcast_dimensions, x_aval):
    kept = [d for d, n in zip(broadcast_dimensions, x_aval.shape) if dy.shape[d] == n]
    summed = jnp.sum(dy, [d for d in range(dy.ndim) if d not in kept])
    return lax.reshape(summed, x_aval.shape)


def _slice(dy, *, start_indices, limit_indices, strides, x_aval):
    strides = strides or (1,) * dy.ndim
    config = [
        (lo, n - lo - (d - 1) * s - 1 if d else n - lo, s - 1)
        for lo, n, d, s in zip(start_indices, x_aval.shape, dy.shape, strides)
    ]
    return lax.pad(dy, jnp.zeros((), dy.dtype), config)


RULES = [
    linear("broadcast_in_dim", "y = x repeated;  x̄ = ȳ summed over the repeats", _broadcast_in_dim),
    linear("reshape", "y = x reshaped;  x̄ = ȳ reshaped back", lambda dy, *, x_aval: lax.reshape(dy, x_aval.shape)),
    linear("squeeze", "y = x without unit dimensions;  x̄ = ȳ with them", lambda dy, *, x_aval: lax.reshape(dy, x_aval.shape)),
    linear("transpose", "y = x permuted;  x̄ = ȳ permuted back", lambda dy, *, permutation: lax.transpose(dy, np.argsort(permutation))),
    linear("rev", "y = x reversed;  x̄ = ȳ reversed", lambda dy, *, dimensions: lax.rev(dy, dimensions)),
    linear("slice", "y = a part of x;  x̄ = ȳ in its place, 0 elsewhere", _slice),
]
