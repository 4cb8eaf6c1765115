"""Rules for reductions."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from fbprop.rule import linear, no_gradient, rule


def _expand(dy, axes, shape):
    """A reduced array, spread again over the axes it was reduced over."""
    return lax.broadcast_in_dim(dy, shape, [d for d in range(len(shape)) if d not in axes])


def _extremum(dy, x, out, *, axes):
    """ȳ shared equally among the elements that attain the extremum, as JAX does."""
    hit = (x == _expand(out, axes, x.shape)).astype(dy.dtype)
    return hit * _expand(dy / jnp.sum(hit, axes), axes, x.shape)


RULES = [
    linear("reduce_sum", "y = Σ x;  x̄ = ȳ, repeated", lambda dy, *, axes, x_aval: _expand(dy, axes, x_aval.shape)),
    rule("reduce_max", "y = max x;  x̄ = ȳ on the maxima, ties share it equally.  Keeps x, y.", x=_extremum),
    rule("reduce_min", "y = min x;  x̄ = ȳ on the minima, ties share it equally.  Keeps x, y.", x=_extremum),
    *no_gradient("An index: discrete, no gradient.", "argmax", "argmin"),
    *no_gradient("A reduction of booleans or bits: no gradient.", "reduce_and", "reduce_or", "reduce_xor"),
]
