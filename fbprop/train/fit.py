"""A whole training run: batches, evaluation, early stopping, checkpoints, progress, a log."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fbprop.data.batching import count_examples
from fbprop.optim.arguments import check_count
from fbprop.optim.chain import check_optimizer
from fbprop.train.checkpoint import read_manifest, restore
from fbprop.train.culprit import Steps, operation
from fbprop.train.evaluate import evaluate, evaluate_batches
from fbprop.train.feed import INSTEAD, ArrayFeed, BatchFeed, Position, check_batches
from fbprop.train.log import Log
from fbprop.train.placement import placement
from fbprop.train.progress import Progress
from fbprop.train.run import Run, Store
from fbprop.train.state import State, init
from fbprop.train.step import epoch, step
from fbprop.train.stopping import BestSoFar, LossWatch, NonFiniteLoss
from fbprop.train.watching import watching


class Fit(NamedTuple):
    """What a run came to.

    Attributes:
      state: after the last step.
      best: after the round that was best on held-out data; without such data, ``state``.
      history: a row per round, as `fbprop.train.read_log` describes them.
      stopped: why: "epochs", "steps" or "patience".
    """

    state: State
    best: State
    history: list[dict[str, Any]]
    stopped: str


def fit(loss: Callable, optimizer, params, data, *, epochs: int | None = None,
        steps: int | None = None, batch_size: int | None = None, every: int | None = None,
        steps_per_dispatch: int | None = None, metric: Callable | None = None, held_out=None,
        monitor: str = "loss", mode: str = "min", patience: int | None = None,
        checkpoints: str | os.PathLike | None = None, keep_last: int = 3, resume: bool = True,
        log: str | os.PathLike | None = None, progress: bool | None = None, mesh=None, layout=None,
        watch=None, **options) -> Fit:
    """Trains until ``epochs`` or ``steps`` are done, or held-out results stop improving.

    A run is a sequence of rounds. At the end of each: the held-out metrics, a row in the history
    and in the log, a checkpoint, and the decision whether to go on. A run that was stopped, however
    abruptly, goes on from its last checkpoint when the same call is made again, and ends with the
    same bits as if nothing had happened.

    Args:
      loss, optimizer, **options: as for `fbprop.train.step`: ``accumulate``, ``compute_dtype``,
        ``rules``, ``fallback``, ``learning``, ``alignment``.
      params: the first parameters; or a `State` from `init`, for a key of one's own, a model state,
        a loss scale or a learning rule's memory. A `State` is donated.
      data: with ``batch_size``, a pytree of arrays with examples along their first axis: they are
        put on the device and shuffled anew in every pass, the n % batch_size last ones of each
        shuffle left out. Without, an iterable of batches (pytrees of arrays), gone through once a
        pass, or a function of the pass's number, from 0, that returns one: so can each pass have
        another order that resuming repeats. A thread loads batches ahead.
      epochs, steps: how many passes, and how many steps in all, those before resuming included;
        whichever ends first.
      every: steps to a round; None: one round a pass. A pass's end ends a round too.
      steps_per_dispatch: that many steps are one `jax.lax.scan`. None: for arrays, a round, up to
        100; for an iterable, 1.
      metric: ``(params, batch) -> metrics`` (``(params, batch, model_state)`` for a state with
        one), a dict as for `evaluate`, or the held-out loss alone.
      held_out: data that are not trained on, in the form of ``data``.
      monitor, mode: the held-out metric to judge by, and whether less ("min") or more ("max") of
        it is better.
      patience: stop after that many rounds without a better one; None: never.
      checkpoints: directory for them, ``step-*.safetensors``; one run a directory.
      keep_last: how many to keep, besides the best.
      resume: False: raise an error if the directory has checkpoints already.
      log: file for a JSON row per round; rows of steps not yet done are dropped from it first. Of
        several processes the first writes it, and shows progress.
      progress: whether to show progress on standard error; None: if that is a terminal.
      mesh, layout: as for `init`. Batches are split over the mesh and sent ahead to their devices;
        the order of the data and, up to rounding, the losses are those of one device. Of several
        processes, which all make the same call, each has all of ``data`` with ``batch_size``, and
        without yields its own part of each batch (`fbprop.mesh.feed`).
      watch: how often to look at what flows, forward and backward: a number of steps, or
        `fbprop.watch.every`. A look is one more gradient, of the last batch (of its first piece) at
        the parameters after it, under the loss scale, by backpropagation also where ``learning`` is
        another rule; it stands in its round's row, for `fbprop.watch.page`. None: never.

    Returns:
      A `Fit`.

    Raises:
      NonFiniteLoss: the loss or the parameters are not finite; it names the step, and the last
        checkpoint is from before. From there, or from the first parameters (but not a `State`),
        up to 1000 steps are made again to name the operation too (`fbprop.watch.first_nonfinite`),
        where ``data`` are no iterator.
      CheckpointError: the newest sound checkpoint is of another model, or all are damaged.
      OSError: the directory for checkpoints cannot be written to.
      ValueError: arguments that do not go together.

    Warns:
      RuntimeWarning: the training loss has risen by half of what it had fallen; or a checkpoint is
        damaged, which is passed over.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim, train
      >>> x = jnp.linspace(-1, 1, 64)
      >>> def loss(params, batch, key):
      ...     return jnp.mean((batch["x"] * params["slope"] - batch["y"]) ** 2)
      >>> done = train.fit(
      ...     loss, optim.adam(0.1), {"slope": jnp.zeros(())}, {"x": x[::2], "y": 3 * x[::2]},
      ...     epochs=50, batch_size=8, patience=10,
      ...     metric=lambda params, batch: loss(params, batch, None),
      ...     held_out={"x": x[1::2], "y": 3 * x[1::2]},
      ... )
      >>> round(float(done.best.params["slope"]), 1)
      3.0
    """
    _check(epochs, steps, metric, held_out, patience, every, steps_per_dispatch)
    check_optimizer(optimizer)
    first = jax.process_index() == 0
    place = placement(mesh, layout)
    with place.around():
        if isinstance(params, State):
            state = place.moved(params)
        else:
            state = init(params, optimizer, mesh=mesh, layout=layout)
        store = None if checkpoints is None else Store(pathlib.Path(checkpoints), keep_last)
        state, past = (state, {}) if store is None else store.resume(state, resume)
        if batch_size is None:
            feed = BatchFeed(data, steps_per_dispatch, every, place.feed)
        else:
            feed = ArrayFeed(data, batch_size, state.key, steps_per_dispatch, every, place.feed)
        run = Run(
            state, Position(*past.get("position", ())), store,
            LossWatch(**past.get("loss", {})), BestSoFar(monitor, mode, **past.get("best", {})),
            _held_out_metrics(metric, held_out, batch_size, place.feed),
            Log(log, int(state.step), writes=first),
        )
        total = _total_steps(run, feed, epochs, steps)
        bar = Progress(total, run.step, progress if first else False)
        try:
            one = step(loss, optimizer, mesh=mesh, layout=layout, **options)
            many = epoch(loss, optimizer, mesh=mesh, layout=layout, **options)
            run.looks = watching(
                watch, Steps(None, feed, one, many, loss, optimizer, place, options)
            )
            feed.rhythm = run.looks.rhythm(feed.rhythm)
            stopped = _reason(run, epochs, steps, patience)
            while stopped is None:
                stopped = _one_pass(run, feed, one, many, bar, (epochs, steps, patience))
        except NonFiniteLoss as error:
            start = _start(run, params, optimizer, mesh, layout)
            named = _named(error, Steps(start, feed, one, many, loss, optimizer, place, options))
            named.add_note(_left_of(run))
            raise named from None
        except Exception as error:
            error.add_note(_left_of(run))
            raise
        finally:
            bar.close()
        return Fit(run.state, run.best_state(), run.log.rows, stopped)


def _start(run, params, optimizer, mesh, layout):
    """Where the run's steps can be made again from: the last checkpoint, or the first parameters.

    A state that was given is gone.
    """
    if run.store is not None and run.store.last is not None:
        last, like = run.store.last, run.state
        return lambda: (
            restore(last, like), Position(*read_manifest(last)["metadata"]["position"])
        )
    if isinstance(params, State):
        return None
    return lambda: (init(params, optimizer, mesh=mesh, layout=layout), Position())


def _named(error, steps):
    """The error with the operation that made what is not finite, where it can be found."""
    try:
        return error.by(operation(steps, error.step))
    except Exception as other:
        error.add_note(f"Looking for the operation that made it failed: {other!r}")
        return error


def _left_of(run):
    """What an error in the midst of a run leaves: the state that was given is donated by then."""
    last = None if run.store is None else run.store.last
    left = "nothing was saved (checkpoints=directory saves)" if last is None else (
        f"the last checkpoint is {last}, from which the same call goes on"
    )
    return f"fbprop.train.fit had made {run.step} steps; {left}."


def _one_pass(run, feed, one, many, bar, limits):
    """Trains to the end of a pass over the data; returns why the run is over, or None."""
    left = None if limits[1] is None else limits[1] - run.step
    with contextlib.closing(feed.dispatches(run.position, left)) as dispatches:
        for d in dispatches:
            if d.indices is None:
                run.state, metrics = one(run.state, d.data)
            else:
                run.state, metrics = many(run.state, d.data, d.indices)
            run.count(d, metrics)
            run.looks.after(d, run.state, run.step)
            bar.update(d.steps, run.text())
            if feed.rhythm.ends_round(d.after) or run.step == limits[1]:
                run.end_round()
                if (stopped := _reason(run, *limits)) is not None:
                    return stopped
    return None


def _reason(run, epochs, steps, patience):
    if patience is not None and run.best.rounds_since >= patience:
        return "patience"
    if steps is not None and run.step >= steps:
        return "steps"
    return "epochs" if epochs is not None and run.position.epoch >= epochs else None


def _held_out_metrics(metric, held_out, batch_size, feed):
    """``state -> {name: float}``, or None without held-out data."""
    if held_out is None:
        return None

    def named(*arguments):
        out = metric(*arguments)
        return out if isinstance(out, dict) else {"loss": out}

    if batch_size is None:
        check_batches("held_out", held_out)
        run, data = evaluate_batches(named), held_out if feed is None else feed.each(held_out)
    else:
        examples = count_examples("held_out", held_out, instead=INSTEAD.format("held_out"))
        if feed is None:
            run, data = evaluate(named, batch_size), jax.device_put(held_out)
        else:
            run, data = evaluate_batches(named), feed.in_order(held_out, examples, batch_size)

    def of(state):
        more = () if state.model_state is None else (state.model_state,)
        got = run(state.params, data() if callable(data) else data, *more)
        got = jax.device_get(got)
        if not all(np.ndim(v) == 0 and hasattr(v, "dtype") for v in got.values()):
            raise TypeError(
                f"A metric is a scalar or a dict of scalars, got {got} expected e.g. "
                '{"accuracy": jnp.mean(...)}.'
            )
        return {k: float(v) for k, v in got.items()}

    return of


def _total_steps(run, feed, epochs, steps):
    """How many steps the run has when nothing ends it early; None if unknown."""
    by_epochs = None
    if epochs is not None and feed.steps is not None:
        done = run.position.epoch * feed.steps + run.position.batch
        by_epochs = run.step - done + epochs * feed.steps
    known = [n for n in (by_epochs, steps) if n is not None]
    return min(known, default=None) if epochs is None or feed.steps is not None else None


def _check(epochs, steps, metric, held_out, patience, every, steps_per_dispatch):
    if epochs is None and steps is None:
        raise ValueError("A run ends, got neither epochs nor steps; expected one of them or both.")
    for name, value in {"epochs": epochs, "steps": steps, "every": every, "patience": patience,
                        "steps_per_dispatch": steps_per_dispatch}.items():
        if value is not None:
            check_count(name, value)
    if not (metric is None or callable(metric)):
        raise TypeError(
            f"A metric is a function, got {type(metric).__name__} expected metric(params, batch)."
        )
    if (metric is None) != (held_out is None):
        raise ValueError(
            "Held-out data are judged by a metric, got one of metric and held_out; expected both: "
            "metric=lambda params, batch: ... without dropout or augmentation, or neither."
        )
    if patience is not None and held_out is None:
        raise ValueError(
            f"Early stopping needs data that are not trained on, got patience={patience} without "
            "held_out; expected both."
        )
