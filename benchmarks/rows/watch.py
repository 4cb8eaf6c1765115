"""What it costs to watch: of every network of the step rows, the gradient with and without.

``..._watched``: norms of values and cotangents at every point; ``..._checked``: who made the first
nan, if there is one. The other program is the same gradient, by fbprop, not watched.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.row import SIZES, Row, entries, named, row

# Imported for what it does: these put the steps into the table that `entries` reads below.
from benchmarks.rows import image_steps, other_steps, sequence_steps, steps  # noqa: F401
from fbprop import watch


def watched(step: Row) -> Row:
    """Norms, against the gradient alone."""
    def ours(params, *batch):
        both, report = watch.value_and_grad(step.loss, of=[watch.norm])(params, *batch)
        return _with(both, (report.values, report.cotangents))

    return _against_plain(step, ours)


def checked(step: Row) -> Row:
    """`watch.first_nonfinite`, against the gradient alone."""
    def ours(params, *batch):
        both, found = watch.first_nonfinite(step.loss)(params, *batch)
        return _with(both, found)

    return _against_plain(step, ours)


def _with(both, seen):
    """Value and gradient, that what was seen is computed for, and does not change."""
    value, gradient = both
    return value + 0 * sum(jnp.sum(x) for x in jax.tree.leaves(seen)), gradient


def _against_plain(step, ours):
    (params, _), batch = step.inputs[:2]
    plain = fbprop.value_and_grad(step.loss)
    # Both are fbprop's gradient: what differs is what XLA fuses.
    build = lambda ad: ours if ad is fbprop else plain
    return Row(build, (params, *batch), tolerance=max(step.tolerance, 1e-4))


def _register(entry, size, kind):
    name = entry.name.removesuffix("_step") + f"_{kind.__name__}"
    make = lambda draw, *dims: kind(entry.make(draw, *dims))
    row("watch", **{size: [entry.dims]})(named(name, entry.make, make))


for _size in SIZES:
    for _entry in entries(_size):
        if _entry.name.endswith("_step") and not _entry.accelerator and _entry.devices == 1:
            for _kind in (watched, checked):
                _register(_entry, _size, _kind)
