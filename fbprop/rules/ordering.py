"""Rules for sorting, the k largest, and clamping: which element goes where is the derivative."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.core.jaxcompat import sharded_like
from fbprop.core.rule import Rule, Step, broadcasting, pair


def _put_back(dy, index, axis, shape):
    """Zeros of ``shape`` with ``dy`` at ``index`` along ``axis``; no index occurs twice."""
    others = tuple(d for d in range(dy.ndim) if d != axis)
    dims = lax.ScatterDimensionNumbers(
        update_window_dims=(), inserted_window_dims=(axis,),
        scatter_dims_to_operand_dims=(axis,), operand_batching_dims=others,
        scatter_indices_batching_dims=others,
    )
    return lax.scatter_add(
        jnp.zeros(shape, dy.dtype), lax.expand_dims(index, (dy.ndim,)), dy, dims,
        unique_indices=True, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


class Sort(Rule):
    """The forward sorts an index along with the operands; only the index is kept."""

    def keeps(self):
        return "the permutation, int32"

    def prepare(self, site):
        dimension, n = site.params["dimension"], len(site.in_avals)
        shape = site.in_avals[0].shape

        def forward(*operands):
            index = lax.broadcasted_iota(jnp.int32, shape, dimension)
            index = sharded_like(index, site.in_avals[0])
            *results, index = lax.sort((*operands, index), **site.params)
            return results, index

        def backward(_, index, dys):
            return [
                _put_back(dys[i], index, dimension, shape) if site.reached[i] else None
                for i in range(n)
            ]

        return Step((), backward, forward)

    def reached(self, site):
        return tuple(a and w for a, w in zip(site.active, site.wanted))


def _top_k(site, kept, dy, _):
    axis = site.params.get("axis", site.params.get("reduction_dimension", -1))
    shape = site.in_avals[0].shape
    return [_put_back(dy, kept[0], axis % len(shape), shape)]


def _largest(name, math):
    # Operand 0, values 1, indices 2.
    return pair(name, math, _top_k, keep=lambda site: (2,), keeps="the indices")


def _where(condition, dy):
    return jnp.where(condition, dy, np.zeros((), dy.dtype))


RULES = [
    Sort(
        "sort", "y = x permuted along a dimension so that the keys ascend, the other operands with "
        "them;  x̄ = ȳ permuted back. Equal keys: as the sort put them.",
        _put_back,
    ),
    _largest("top_k", "y, i = the k largest of x and where they are;  x̄ = ȳ at i, 0 elsewhere"),
    _largest("approx_top_k", "y, i = nearly the k largest of x;  x̄ = ȳ at i, 0 elsewhere"),
    broadcasting(
        "clamp", "y = min(max(x, lo), hi);  x̄ = ȳ where lo < x < hi, lō = ȳ where x < lo < hi, "
        "hī = ȳ where x > hi. Kinks x = lo, x = hi: 0 to all three, as JAX. Keeps lo, x, hi.",
        lo=lambda dy, lo, x, hi: _where((lo > x) & (lo < hi), dy),
        x=lambda dy, lo, x, hi: _where((x > lo) & (x < hi), dy),
        hi=lambda dy, x, hi: _where(x > hi, dy),
    ),
]
