"""Rows of rules/indexing.py."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cases.case import Case, between, complex_, exactly, integers, real

REPEATED = exactly([3, 1, 3, 0], "int32")  # element 3 twice
OUTSIDE = exactly([3, 9, -7, 0], "int32")  # two out of the bounds of 5
UNIQUE = exactly([3, 1, 4], "int32")


def starts(*values):
    return [exactly(v, "int32") for v in values]



def low(*shape):
    """Updates of which most, not all, are less than standard normal numbers."""
    return between(-3.0, 1.0, *shape)


def high(*shape):
    return between(-1.0, 3.0, *shape)


def put(method, **options):
    """Rows set, added, ... at indices."""
    return lambda x, i, u: getattr(x.at[i], method)(u, **options)


def windows(mode):
    """Windows of 2 x 3 at positions in dimensions 2 and 0, out of order and overlapping."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1, 2), collapsed_slice_dims=(1,), start_index_map=(2, 0)
    )
    return lambda x, i: lax.gather(x, i, numbers, (2, 1, 3), mode=mode)


def write_windows(scatter):
    """The scatter of the same windows: they overlap."""
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(1,), scatter_dims_to_operand_dims=(2, 0)
    )
    return lambda x, i, u: scatter(x, i, u, numbers)


def read_along(x, i):
    """Columns read by index within each row: operand_batching_dims."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(), collapsed_slice_dims=(1,), start_index_map=(1,),
        operand_batching_dims=(0,), start_indices_batching_dims=(0,),
    )
    return lax.gather(x, i[..., None], numbers, (1, 1))


def write_along(scatter):
    """Columns written so."""
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(), inserted_window_dims=(1,), scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=(0,), scatter_indices_batching_dims=(0,),
    )
    return lambda x, i, u: scatter(x, i[..., None], u, numbers)


POSITIONS = exactly([[0, 0], [1, 1], [4, 2]], "int32")
FAR_POSITIONS = exactly([[0, 0], [9, 1], [-1, 9]], "int32")
VOLUME, PATCHES = (5, 1, 7), (3, 2, 3)


def rows(name, method, scatter, draw=real, winners=False):
    """The rows that every kind of scatter has.

    ``draw`` gives the updates; ``winners``: kept are, besides the int32 indices, a boolean per
    element of the updates.
    """
    x, u = real(5, 2), draw(4, 2)

    def row(fun, operands, label, updates, indices):
        kept = updates + 4 * indices if winners else None
        return Case(name, fun, operands, label, kept=kept)

    return [
        row(put(method), (x, REPEATED, u), "", 8, 4),
        row(put(method, mode="drop"), (x, OUTSIDE, u), "drop", 8, 4),
        row(put(method, mode="clip"), (x, REPEATED, u), "clip", 8, 4),
        row(write_windows(scatter), (real(*VOLUME), POSITIONS, draw(*PATCHES)), "windows", 18, 6),
        row(write_along(scatter), (real(3, 5), integers(0, 5, 3, 2), draw(3, 2)), "batched", 6, 6),
        unique(name, method),
    ]


def unique(name, method):
    """The caller promises that no two updates meet."""
    put_unique = put(method, mode="promise_in_bounds", unique_indices=True)
    return Case(name, put_unique, (real(5, 2), UNIQUE, real(3, 2)), "unique")


def multiply(method, **options):
    """Repeated indices and constant updates: JAX, too, has no cotangent for these."""
    u = jnp.asarray([2.0, 3.0, 0.5, -1.0])[:, None]
    return lambda x, i: put(method, **options)(x, i, u.astype(x.dtype))


# Element 0 and two updates attain the result; two updates of element 1 beat it.
TIES = np.array([1.0, 2.0, 3.0]), np.array([0, 0, 1, 1]), np.array([1.0, 1.0, 5.0, 5.0])
TIED = tuple(exactly(v) for v in TIES)

CASES = [
    Case("gather", lambda x, i: x[i], (real(5, 2), REPEATED)),
    Case("gather", lambda x, i: x.at[i].get(mode="fill", fill_value=7.0), (real(5, 2), OUTSIDE),
         "fill"),
    Case("gather", lambda x, i: x.at[i].get(mode="clip"), (real(5, 2), OUTSIDE), "clip"),
    Case("gather", lambda x, i: x[i, i - 2], (real(5, 3), REPEATED), "points"),
    Case("gather", lambda x, i: x.at[i].get(unique_indices=True, mode="promise_in_bounds"),
         (complex_(5, 2), UNIQUE), "unique", dtypes=("float32",)),
    Case("gather", windows("clip"), (real(*VOLUME), FAR_POSITIONS), "windows-clip"),
    Case("gather", windows("fill"), (real(*VOLUME), POSITIONS), "windows"),
    Case("gather", read_along, (real(3, 5), integers(0, 5, 3, 2)), "batched"),
    *rows("scatter-add", "add", lax.scatter_add),
    Case("scatter-add", lambda x, i: jax.ops.segment_sum(x, i, 3),
         (real(5, 2), exactly([2, 0, 2, 2, 1], "int32")), "segment_sum"),
    Case("scatter-add", lambda x, u: x.at[1:4:2, 0].add(u), (complex_(5, 2), complex_(2)),
         "complex", dtypes=("float32",)),
    *rows("scatter-sub", "subtract", lax.scatter_sub),
    Case("scatter-mul", multiply("multiply"), (real(5, 2), REPEATED)),
    Case("scatter-mul", multiply("multiply", mode="drop"), (real(5, 2), OUTSIDE), "drop"),
    unique("scatter-mul", "multiply"),
    *rows("scatter-min", "min", lax.scatter_min, low),
    *rows("scatter-max", "max", lax.scatter_max, high),
    Case("scatter-max", put("max"), TIED, "ties", differences=False,
         at=((TIES, {0: [1 / 3, 0.0, 1.0], 2: [1 / 3, 1 / 3, 0.5, 0.5]}),)),
    *rows("scatter", "set", lax.scatter, winners=True),
    Case("scatter", lambda x, i: x.at[i].set(2.0), (real(5, 2), REPEATED), "constant"),
    Case("scatter", lambda x: x.at[1:4, 1].set(x[0, 0]), (real(5, 2),), "slice"),
    Case("dynamic_slice", lambda x, i, j: lax.dynamic_slice(x, (i, j), (2, 3)),
         (real(5, 7), exactly(2, "int32"), exactly(3, "int32"))),
    Case("dynamic_slice", lambda x, i, j: lax.dynamic_slice(x, (i, j), (2, 3)),
         (real(5, 7), exactly(-1, "int32"), exactly(-9, "int32")), "clamped"),
    Case("dynamic_slice", lambda x, i: x[i], (real(5, 2), exactly(-2, "int32")), "index"),
    Case("dynamic_update_slice", lambda x, u, i, j: lax.dynamic_update_slice(x, u, (i, j)),
         (real(5, 7), real(2, 3), exactly(2, "int32"), exactly(3, "int32"))),
    Case("dynamic_update_slice", lambda x, u, i, j: lax.dynamic_update_slice(x, u, (i, j)),
         (real(5, 7), real(2, 3), exactly(4, "int32"), exactly(-9, "int32")), "clamped"),
]
