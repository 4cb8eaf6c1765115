"""Loading ahead: a thread prepares the next batches while the device works on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class _Failed(NamedTuple):
    error: BaseException


_END = object()
_POLL = 0.1  # seconds after which a waiting thread looks whether anybody still wants its batch


def prefetch(batches: Iterable[Any], size: int = 2) -> Iterator[Any]:
    """The same batches in the same order, made by a thread that runs ahead.

    It pays when making a batch takes time outside Python's interpreter lock: reading, decoding,
    NumPy. `fbprop.train.fit` calls it, and moves batches to the device.

    Args:
      batches: any iterable.
      size: how many finished batches may wait.

    Yields:
      The batches. An error raised while making one is raised here, after the batches before it.
      The thread ends when the batches do, or when the generator is closed or collected.

    Raises:
      ValueError: ``size`` < 1.

    Example:
      >>> from fbprop.data.prefetch import prefetch
      >>> list(prefetch(range(4)))
      [0, 1, 2, 3]
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"Batches wait in a queue, got size={size!r} expected >= 1.")
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"Batches are gone through one by one, got {type(batches).__name__} expected an "
            "iterable: a list, a generator."
        )
    return _run(batches, size)


def _run(batches, size):
    ready: queue.Queue = queue.Queue(size)
    closed = threading.Event()
    thread = threading.Thread(target=_fill, args=(batches, ready, closed), daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        closed.set()
        thread.join()


def _fill(batches, ready, closed):
    try:
        for batch in batches:
            if not _put(batch, ready, closed):
                return
        _put(_END, ready, closed)
    except BaseException as error:  # handed over, whatever it is: the thread has no one to tell
        _put(_Failed(error), ready, closed)


def _put(item, ready, closed) -> bool:
    """Whether the item was taken, waiting for room unless the reader is gone."""
    while not closed.is_set():
        try:
            ready.put(item, timeout=_POLL)
            return True
        except queue.Full:
            continue
    return False
