"""What each dispatch of a run works on, from arrays in memory or from an iterable of batches."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fbprop.data.batching import batches, count_examples
from fbprop.data.prefetch import prefetch

# Steps in a dispatch over arrays in memory: a call costs about 0.1 ms, so that more than these
# gain nothing, and progress shows and Ctrl-C works between dispatches.
_MOST_STEPS = 100
# No step's number (int32), so that shuffling shares no random numbers with any step.
_SHUFFLING = 2**32 - 1

# What the user may have meant, where arrays belong.
INSTEAD = ": without batch_size, {} is an iterable of batches"


class Position(NamedTuple):
    """Where in the data a run is: passes completed, and batches seen of the current one."""

    epoch: int = 0
    batch: int = 0


class Dispatch(NamedTuple):
    """One call of a jitted function.

    Attributes:
      steps: how many steps it makes.
      data: one batch, or what `fbprop.train.epoch` takes batches from.
      indices: for `fbprop.train.epoch`; None for one batch.
      after: the position after it.
    """

    steps: int
    data: Any
    indices: Any
    after: Position


class Rhythm(NamedTuple):
    """Where dispatches end: after ``most`` steps, and wherever a round of ``every`` steps does."""

    most: int
    every: int | None

    def next_steps(self, batch: int, left: int | None) -> int:
        """How many steps the dispatch from batch number ``batch`` on makes, ``left`` at most."""
        ends = [self.most]
        if self.every is not None:
            ends.append(self.every - batch % self.every)
        if left is not None:
            ends.append(left)
        return min(ends)

    def ends_round(self, after: Position) -> bool:
        return after.batch == 0 or (self.every is not None and after.batch % self.every == 0)


class ArrayFeed:
    """Batches of a pytree of arrays, shuffled anew in every pass.

    The data lie on the device; on a mesh only a dispatch's batches do, each device's part on it.
    """

    again = True  # whether a pass can be gone through once more

    def __init__(self, data, batch_size: int, key, most: int | None, every: int | None, mesh=None):
        self.examples = count_examples("data", data, instead=INSTEAD.format("data"))
        self.mesh, self.size = mesh, batch_size
        if mesh is None:
            self.data = _on_device(data)
        else:
            _check_numbers(data)
            mesh.check(batch_size)
            self.data = jax.tree.map(np.asarray, data)
        self.key = jax.random.fold_in(key, _SHUFFLING)  # a state's own goes with the state
        self.steps = jax.eval_shape(lambda: batches(self.examples, batch_size)).shape[0]
        whole = min(self.steps, every or self.steps)
        dispatches = max(1, -(-whole // _MOST_STEPS))
        self.rhythm = Rhythm(most or max(1, -(-whole // dispatches)), every)

    def dispatches(self, position: Position, left: int | None) -> Iterator[Dispatch]:
        """From ``position`` to the end of its pass, ``left`` steps at most."""
        made = self._dispatches(position, left)
        if self.mesh is None:
            yield from made
            return
        with contextlib.closing(prefetch(made, 1)) as ahead:
            yield from ahead

    def _dispatches(self, position, left):
        indices = np.asarray(_order(self.examples, self.size, self.key, position.epoch))
        start = position.batch
        while start < self.steps and left != 0:
            n = min(self.rhythm.next_steps(start, left), self.steps - start)
            rows, after = indices[start:start + n], _after(position, start + n, self.steps)
            yield Dispatch(n, *self._batches(rows), after)
            start, left = start + n, left and left - n

    def _batches(self, rows):
        if self.mesh is None:
            return self.data, rows
        return jax.tree.map(lambda x: self.mesh.rows(x, rows), self.data), np.arange(len(rows))


class BatchFeed:
    """Batches from an iterable, or from a function of the pass's number that returns one."""

    def __init__(self, data: Iterable | Callable, most: int | None, every: int | None, mesh=None):
        check_batches("data", data)
        self.data, self.mesh = data, mesh
        self.again = not isinstance(data, Iterator)
        self.steps = None
        self.rhythm = Rhythm(most or 1, every)

    def dispatches(self, position: Position, left: int | None) -> Iterator[Dispatch]:
        """From ``position`` to the end of its pass, ``left`` steps at most."""
        source = self.data(position.epoch) if callable(self.data) else self.data
        check_batches("data of a pass", source)
        seen = position.batch
        with contextlib.closing(prefetch(itertools.islice(source, seen, None))) as loaded:
            groups = self._groups(loaded, seen, left)
            # One group ahead: to know which is the last, and to have the next one on its way to
            # the device while this one is worked on.
            held = next(groups, None)
            if held is None:
                raise ValueError(
                    f"Every pass over the data has batches, got none in pass {position.epoch + 1} "
                    f"after {seen} of them; expected an iterable that starts anew each time: a "
                    "list, an object with __iter__, or a function of the pass's number."
                )
            while held is not None:
                following = next(groups, None)
                seen += held[0]
                more = following is not None or self._cut(loaded)
                after = _after(position, seen, None if more else seen)
                yield Dispatch(*held, after)
                held = following

    def _groups(self, loaded, seen, left):
        """(steps, data, indices) of every dispatch: batches of one form, put together."""
        kept = []
        for batch in loaded:
            if kept and _form(batch) != _form(kept[0]):
                yield from map(self._single, kept)
                seen, left, kept = seen + len(kept), left and left - len(kept), []
            kept.append(batch)
            if len(kept) == self.rhythm.next_steps(seen, left):
                yield from [self._stacked(kept)] if len(kept) == self.rhythm.most > 1 else map(
                    self._single, kept
                )
                seen, left, kept = seen + len(kept), left and left - len(kept), []
                if left == 0:
                    return
        yield from map(self._single, kept)

    def _single(self, batch):
        return 1, _on_device(batch, self.mesh), None

    def _stacked(self, group):
        """Several batches as one array each, for one dispatch."""
        def one(*xs):
            on_host = all(isinstance(x, np.ndarray) for x in xs)
            return (np if on_host else jnp).stack(xs)

        stacked = jax.tree.map(one, *group)
        return len(group), _on_device(stacked, self.mesh, 1), np.arange(len(group))

    def _cut(self, loaded) -> bool:
        """Whether a pass that was cut short by the number of steps had further batches."""
        return next(loaded, None) is not None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _order(examples, size, key, epoch):
    """The batches of a pass: one program to compile, where its steps alone are twelve."""
    return batches(examples, size, key=jax.random.fold_in(key, epoch))


def check_batches(name, data):
    """Refuses arrays where batches of them belong: a dict would be gone through key by key."""
    iterable = isinstance(data, Iterable) and not isinstance(data, (str, bytes))
    if isinstance(data, Mapping) or hasattr(data, "shape") or not (iterable or callable(data)):
        raise ValueError(
            f"Without batch_size, {name} is an iterable of batches, got {type(data).__name__} "
            "expected a list, a generator or a function of the pass's number: pass batch_size "
            "to have batches made of arrays."
        )


def _after(position, seen, end):
    return Position(position.epoch + 1, 0) if seen == end else Position(position.epoch, seen)


def _on_device(tree, mesh=None, lead=0):
    """Batches on the device, or each device's part on it; ``lead`` axes are before the examples."""
    _check_numbers(tree)
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(lambda x: mesh.local(x, lead), tree)


def _check_numbers(tree):
    for x in jax.tree.leaves(tree):
        kind = getattr(x, "dtype", None)
        if not isinstance(x, (bool, int, float, complex)) and (kind is None or kind.kind in "OSU"):
            raise TypeError(
                f"Batches are pytrees of arrays of numbers, got one that holds a "
                f"{type(x).__name__} of {kind or 'no dtype'}; expected arrays: encode words and "
                "classes as integers."
            )


def _form(batch):
    leaves, tree = jax.tree.flatten(batch)
    return tree, [(np.shape(x), getattr(x, "dtype", type(x))) for x in leaves]
