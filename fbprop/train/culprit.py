"""Which operation made a loss that is not finite: the last steps of a run, made once more.

By the time a loss is seen, the parameters before it are gone: their memory is the next ones'. They
are made again, from the last checkpoint or the first parameters, step by step as they were made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import tree_map

from fbprop import watch
from fbprop.train.gradients import in_equal_pieces
from fbprop.train.step import loss_at

MOST = 1000  # steps that are made again at most, so that an error does not wait for hours


class Steps(NamedTuple):
    """How a run's steps are made again.

    Attributes:
      start: ``() -> (State, Position)``, or None if there is nothing to start from.
      feed: of the run.
      one, many: of a batch, and of several: `fbprop.train.step`, `fbprop.train.epoch`.
      loss, optimizer, place, options: what they are made of.
    """

    start: Callable | None
    feed: Any
    one: Callable
    many: Callable
    loss: Callable
    optimizer: Any
    place: Any
    options: dict


def operation(steps: Steps, number: int) -> watch.Origin | None:
    """The operation that made what is not finite in step ``number`` or the gradients before it.

    None if there is nothing to start from, too far to go, or if batches do not come again.
    """
    if steps.start is None or not steps.feed.again or jax.process_count() > 1:
        return None
    state, position = steps.start()
    done = int(state.step)
    if number - done > MOST:
        return None
    look = _looking(steps)
    while done < number:
        with contextlib.closing(steps.feed.dispatches(position, number - done)) as dispatches:
            for d in dispatches:
                if done + d.steps < number - 1:
                    state = _whole(steps, state, d)
                else:
                    state, found = _by_step(steps, state, d, look, number - done)
                    if found is not None:
                        return found
                done, position = done + d.steps, d.after
    return None


def _whole(steps, state, d):
    if d.indices is None:
        return steps.one(state, d.data)[0]
    return steps.many(state, d.data, d.indices)[0]


def _by_step(steps, state, d, look, last):
    """The state after a dispatch, and what is found in its steps ``last - 1`` and ``last``."""
    for i in range(d.steps):
        batch = d.data if d.indices is None else tree_map(lambda x: x[d.indices[i]], d.data)
        # Gradients that overflow under a loss scale are no fault: the scale falls.
        if i + 1 == last or (i + 2 == last and state.loss_scale is None):
            found = look(state, batch)
            if found is not None:
                return state, found
        state = steps.one(state, batch)[0]
    return state, None


def _looking(steps):
    """``(state, batch) -> Origin or None``."""
    options = steps.options
    engine = {k: options[k] for k in ("rules", "fallback") if k in options}
    pieces = options.get("accumulate", 1)
    at = loss_at(steps.loss, steps.optimizer, steps.place, options.get("compute_dtype"))

    @jax.jit
    def found_in(state, batch, key):
        loss, params = at(state, key)
        return watch.first_nonfinite(loss, has_aux=True, **engine)(params, batch)[1]

    def look(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        if pieces == 1:
            return found_in(state, batch, key).first()
        split = in_equal_pieces(batch, pieces)
        each = (
            found_in(state, tree_map(lambda x: x[i], split), jax.random.fold_in(key, i)).first()
            for i in range(pieces)
        )
        return next((found for found in each if found is not None), None)

    return look
