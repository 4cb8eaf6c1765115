"""Rules for communication between devices along named axes, as under `shard_map` and `vmap`.

All are linear, and each one's transpose is another of them. Where JAX tracks which axes a value
varies over (``shard_map`` with ``check_vma``), summing a varying value makes an invariant one
(``psum_invariant``) and ``pvary`` is the step back; elsewhere ``psum`` is its own transpose.
"""

from __future__ import annotations

from jax import lax

from fbprop.core.rule import linear, no_gradient


def _all_to_all(dy, *, split_axis, concat_axis, axis_name, axis_index_groups, tiled):
    return lax.all_to_all(
        dy, axis_name, concat_axis, split_axis, axis_index_groups=axis_index_groups, tiled=tiled
    )


def _all_gather(dy, *, axis_name, all_gather_dimension, axis_index_groups, tiled):
    return lax.psum_scatter(
        dy, axis_name, scatter_dimension=all_gather_dimension,
        axis_index_groups=axis_index_groups, tiled=tiled,
    )


def _all_gather_invariant(dy, *, axis_name, all_gather_dimension, axis_size, tiled):
    """Every device has the whole cotangent already: it takes its own part."""
    axes = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    size = dy.shape[all_gather_dimension] // axis_size if tiled else 1
    mine = lax.dynamic_slice_in_dim(
        lax.pcast(dy, tuple(axes), to="varying"), lax.axis_index(axes) * size, size,
        all_gather_dimension,
    )
    return mine if tiled else lax.squeeze(mine, (all_gather_dimension,))


def _reduce_scatter(dy, *, axis_name, scatter_dimension, axis_index_groups, tiled):
    return lax.all_gather(
        dy, axis_name, axis=scatter_dimension, axis_index_groups=axis_index_groups, tiled=tiled
    )


def _psum(dy, *, axes, axis_index_groups, x_aval):
    """Named axes are summed across devices; a number is a dimension that `vmap` made of a name."""
    named = tuple(a for a in axes if not isinstance(a, int))
    kept = [d for d in range(x_aval.ndim) if d not in axes]
    dy = lax.psum(dy, named, axis_index_groups=axis_index_groups) if named else dy
    return lax.broadcast_in_dim(dy, x_aval.shape, kept)


def _ppermute(dy, *, axis_name, perm):
    return lax.ppermute(dy, axis_name, [(to, source) for source, to in perm])


RULES = [
    linear("psum", "y = Σ x over the axis, on every device;  x̄ = Σ ȳ", _psum),
    linear(
        "psum_invariant", "y = Σ x, invariant;  x̄ = ȳ, seen as varying",
        lambda dy, *, axes: lax.pcast(dy, tuple(axes), to="varying"),
    ),
    linear(
        "pvary", "y = x, seen as varying;  x̄ = Σ ȳ", lambda dy, *, axes: lax.psum(dy, tuple(axes))
    ),
    linear("all_gather", "y = all x, side by side;  x̄ = Σ ȳ, own part of it", _all_gather),
    linear(
        "all_gather_invariant", "y = all x, side by side, invariant;  x̄ = own part of ȳ",
        _all_gather_invariant,
    ),
    linear("reduce_scatter", "y = own part of Σ x;  x̄ = all ȳ, side by side", _reduce_scatter),
    linear("ppermute", "y = x of another device;  x̄ = ȳ sent back; 0 if nobody sent", _ppermute),
    linear("all_to_all", "y = parts of x exchanged;  x̄ = ȳ exchanged back", _all_to_all),
    *no_gradient("A device's number: no gradient.", "axis_index"),
]
