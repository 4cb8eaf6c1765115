"""Adding rows to a table, in order where XLA's scatter-add is slow."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.core.devices import by_platform
from fbprop.core.jaxcompat import adds_by_compare_and_swap, explicit_sharding, varying_like
from fbprop.core.precision import at_least_float32

_MODES = (
    lax.GatherScatterMode.CLIP,
    lax.GatherScatterMode.FILL_OR_DROP,
    lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)


def formulation(table, indices_shape, values_shape, numbers, options) -> str:
    """How rows are added to a table of this type on NVIDIA GPUs: "rows sorted", or "".

    There each element is added by compare-and-swap, which is 20 times (bfloat16, openxla/xla#26371)
    to 2000 times (float32, jax-ml/jax#38806) as slow where updates meet, and in no certain order.
    Sorting pays where they may: for whole rows, as of an embedding, and for elements if there are
    more of them than places to add them to. A loss's one element per example is left as it is.
    The numbers are those reports'; `python -m benchmarks --only embedding` measures it on a GPU.
    """
    rows = math.prod(table.shape[d] for d in numbers.inserted_window_dims)
    count = math.prod(indices_shape[:-1])
    sortable = (
        count > 1
        and adds_by_compare_and_swap(table.dtype)
        and not options["unique_indices"]
        and are_whole_rows(table, values_shape, numbers, options)
    )
    meet = count > rows or math.prod(values_shape) > count
    return "rows sorted" if sortable and meet else ""


def are_whole_rows(table, values_shape, numbers, options) -> bool:
    """Whether windows are all there is at their indices: two of them meet wholly or not at all."""
    whole = [s for d, s in enumerate(table.shape) if d not in numbers.inserted_window_dims]
    return (
        options["mode"] in _MODES
        and not numbers.operand_batching_dims
        and sorted(numbers.scatter_dims_to_operand_dims) == list(numbers.inserted_window_dims)
        and whole == [values_shape[d] for d in numbers.update_window_dims]
        and explicit_sharding(table) is None
    )


def is_one_each(shape, indices, numbers) -> bool:
    """Whether of each row along one axis one element is meant, as by `jnp.take_along_axis`.

    Args:
      shape: the table's; indices: their type.
    """
    others = tuple(d for d in range(len(shape)) if d not in numbers.inserted_window_dims)
    return (
        not numbers.update_window_dims
        and len(numbers.scatter_dims_to_operand_dims) == 1
        and numbers.operand_batching_dims == others
        and numbers.scatter_indices_batching_dims == tuple(range(len(others)))
        and indices.size == math.prod(shape[d] for d in others)
        and explicit_sharding(indices) is None
    )


def one_each(shape, indices, values, numbers, mode):
    """One element of each row and zeros, for `is_one_each`: elementwise, to be fused.

    Where a GPU adds them to an array, that array has to be written first. ``gpt2_124m_step`` writes
    the logits' cotangent in bfloat16 alone then.
    """
    meant, spread = _meant(shape, indices, numbers, mode)
    return jnp.where(meant, spread(values), jnp.zeros((), values.dtype))


def picked(x, indices, numbers, mode, fill):
    """One element of each row, for `is_one_each`, as a sum: what x is made of is read.

    ``fill`` stands for what is out of bounds, by default nan.
    """
    axis, = numbers.inserted_window_dims
    meant, _ = _meant(x.shape, indices, numbers, mode)
    total = jnp.sum(jnp.where(meant, x, jnp.zeros((), x.dtype)), axis)
    if mode == lax.GatherScatterMode.CLIP:
        return total
    at, fill = _counting(indices).reshape(total.shape), jnp.nan if fill is None else fill
    inside = (at >= 0) & (at <= x.shape[axis] - 1)  # devices have nothing to ask of each other
    return jnp.where(inside, total, jnp.asarray(fill, x.dtype))


def _meant(shape, indices, numbers, mode):
    """Where the elements of `is_one_each` are; and how one number a row becomes an array."""
    (axis,), indices = numbers.inserted_window_dims, _counting(indices)
    if mode == lax.GatherScatterMode.CLIP:
        indices = lax.clamp(indices.dtype.type(0), indices, indices.dtype.type(shape[axis] - 1))
    one = tuple(1 if d == axis else s for d, s in enumerate(shape))
    spread = lambda x: lax.broadcast_in_dim(lax.reshape(x, one), shape, range(len(shape)))
    return lax.broadcasted_iota(indices.dtype, shape, axis) == spread(indices), spread


def _counting(indices):
    """In a type that counts up to an axis' size."""
    return indices if indices.dtype.itemsize >= 4 else indices.astype(jnp.int32)


def scatter_add(total, indices, values, numbers, options):
    """`jax.lax.scatter_add`, by whichever `formulation`."""
    types = jax.typeof(total), indices.shape, values.shape
    if formulation(*types, numbers, options):
        return _sorted_on_gpus(total, indices, values, numbers, tuple(options.items()))
    return lax.scatter_add(total, indices, values, numbers, **options)


# Compiled: un-jitted, both branches would be traced at every call.
@functools.partial(jax.jit, static_argnames=("numbers", "options"))
def _sorted_on_gpus(total, indices, values, numbers, options):
    options = dict(options)
    as_it_stands = functools.partial(lax.scatter_add, dimension_numbers=numbers, **options)
    in_order = functools.partial(add_sorted, numbers=numbers, mode=options["mode"])
    return by_platform(total, indices, values, cuda=in_order, default=as_it_stands)


def add_sorted(total, indices, values, numbers, mode):
    """Rows in the order of their indices are summed where these are equal, and each sum is added.

    No two sums go to one place: nothing needs to be atomic, and nothing depends on chance.
    16-bit numbers are summed in float32.
    """
    columns, order = _sorted_columns(total.shape, indices, numbers, mode)
    values = _in_a_row(values, numbers).at[order].get(
        unique_indices=True, mode="promise_in_bounds"
    )
    differ = functools.reduce(lax.bitwise_or, [c[1:] != c[:-1] for c in columns])
    wide = at_least_float32(values)
    sums = _sums_of_runs(varying_like(wide, indices), differ)
    # What is not the sum of a whole run goes out of bounds, each to another place.
    outside = order + total.shape[numbers.scatter_dims_to_operand_dims[0]]
    columns[0] = lax.select(_joined(differ, True), columns[0], outside)
    return lax.scatter_add(
        total, jnp.stack(columns, -1), sums.astype(total.dtype), _numbers_in_a_row(sums, numbers),
        unique_indices=True, mode="drop",
    )


def merged(shape, indices, values, numbers, mode):
    """Whole rows, those that meet summed into the first of them: indices, values, numbers.

    The others go out of bounds, each to another place, where nothing is added. Needs no sorting: of
    the rows at one place, the first is the smallest number scattered there.
    """
    at = _columns(shape, indices, numbers, mode)
    if jnp.issubdtype(at[0].dtype, jnp.signedinteger):  # none of them is counted from the end
        at = [lax.select(c < 0, lax.full_like(c, jnp.iinfo(c.dtype).max), c) for c in at]
    number = lax.iota(at[0].dtype, at[0].size)
    sizes = [shape[d] for d in numbers.scatter_dims_to_operand_dims]
    at = tuple(at)
    first = jnp.full(sizes, number.size, number.dtype).at[at].min(number, mode="drop")
    mine = first.at[at].get(mode="fill", fill_value=number.size)
    values = _in_a_row(values, numbers)
    sums = jnp.zeros_like(values).at[mine].add(values, mode="drop")
    outside = number + shape[numbers.scatter_dims_to_operand_dims[0]]
    column = lax.select(mine == number, at[0], outside)
    return jnp.stack([column, *at[1:]], -1), sums, _numbers_in_a_row(sums, numbers)


def _in_a_row(values, numbers):
    """Updates with their windows' dimensions last and the others made one."""
    window = tuple(values.shape[d] for d in numbers.update_window_dims)
    ends = [d for d in range(values.ndim) if d not in numbers.update_window_dims]
    values = lax.transpose(values, (*ends, *numbers.update_window_dims))
    return lax.reshape(values, (math.prod(values.shape[: len(ends)]), *window))


def _numbers_in_a_row(values, numbers):
    return lax.ScatterDimensionNumbers(
        tuple(range(1, values.ndim)), numbers.inserted_window_dims,
        numbers.scatter_dims_to_operand_dims,
    )


def _columns(shape, indices, numbers, mode):
    """Indices as columns, in bounds where they are meant to be."""
    if indices.dtype.itemsize < 4:  # there has to be room outside of the bounds
        indices = indices.astype(jnp.int32)
    flat = lax.reshape(indices, (math.prod(indices.shape[:-1]), indices.shape[-1]))
    columns = [lax.index_in_dim(flat, i, 1, keepdims=False) for i in range(flat.shape[1])]
    if mode == lax.GatherScatterMode.CLIP:
        sizes = [shape[d] for d in numbers.scatter_dims_to_operand_dims]
        inside = [map(indices.dtype.type, (0, s - 1)) for s in sizes]
        columns = [lax.clamp(low, c, high) for c, (low, high) in zip(columns, inside)]
    return columns


def _sorted_columns(shape, indices, numbers, mode):
    """Indices as columns, sorted by the first, then the second, ..., and where each was."""
    columns = _columns(shape, indices, numbers, mode)
    order = lax.iota(columns[0].dtype, columns[0].size)
    *columns, order = lax.sort([*columns, order], num_keys=len(columns), is_stable=True)
    return columns, order


def _sums_of_runs(values, differ):
    """Sum of each row and those before it in its run; ``differ``: where the next run starts.

    Each step adds what is there one, two, four, ... rows above. `lax.associative_scan` passes over
    fewer rows, but takes 40 ms to trace, on every platform.
    """
    n = len(values)
    at = lax.iota(jnp.int32, n)
    start = lax.cummax(lax.select(_joined(True, differ), at, lax.full_like(at, 0)))

    def double(sums, shift):
        above = lax.dynamic_slice_in_dim(lax.concatenate([sums, sums], 0), n - shift, n)
        meet = lax.broadcast_in_dim(at - shift >= start, sums.shape, (0,))
        return lax.select(meet, sums + above, sums), None

    shifts = 2 ** np.arange((n - 1).bit_length(), dtype=np.int32)
    return lax.scan(double, values, shifts)[0]


def _joined(*flags):
    return lax.concatenate([lax.reshape(f, (np.size(f),)) for f in flags], 0)
