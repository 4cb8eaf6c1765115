"""Batches: which examples each step sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def batches(n: int, batch_size: int, *, key: jax.Array | None = None,
            drop_remainder: bool = True) -> jax.Array:
    """Indices of the examples in each batch of one pass over ``n`` examples.

    Fit for `fbprop.train.epoch`; works under `jax.jit` with ``n`` and ``batch_size`` static.

    Args:
      n: number of examples.
      batch_size: examples a batch.
      key: a JAX random key to shuffle by; the same key, the same order. None: in order.
      drop_remainder: what to do with the n % batch_size last examples of the shuffle: leave them
        out (another key leaves out others), or, if False, fill their batch up with the shuffle's
        first ones, which are then seen twice.

    Returns:
      int32 [steps, batch_size]; no index occurs twice when the remainder is dropped.

    Raises:
      ValueError: not 1 <= batch_size <= n.

    Example:
      >>> from fbprop import data
      >>> data.batches(7, 3).tolist()
      [[0, 1, 2], [3, 4, 5]]
      >>> data.batches(7, 3, drop_remainder=False).tolist()
      [[0, 1, 2], [3, 4, 5], [6, 0, 1]]
    """
    order = _order(n, batch_size, key)
    steps = n // batch_size if drop_remainder else -(-n // batch_size)
    return order[jnp.arange(steps * batch_size) % n].reshape(steps, batch_size)


def iterate(data: Any, batch_size: int, *, key: jax.Array | None = None,
            drop_remainder: bool = False) -> Iterator[Any]:
    """Batches of a pytree of arrays, one after the other.

    Args:
      data: arrays (NumPy's or JAX's) with the examples along the first axis.
      batch_size, key: see `batches`.
      drop_remainder: whether to leave out a last batch that is smaller than the others.

    Yields:
      Pytrees like ``data``, ``batch_size`` examples each.

    Raises:
      ValueError: the arrays have different numbers of examples, or not 1 <= batch_size <= n.

    Example:
      >>> import numpy as np
      >>> from fbprop import data
      >>> [batch["x"].tolist() for batch in data.iterate({"x": np.arange(5)}, 2)]
      [[0, 1], [2, 3], [4]]
    """
    counts = sorted({np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)})
    counts = [n for first in counts for n in first or [None]]
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"Arrays of a data set have one row per example, got first axes of {counts} expected "
            "one length for all: arrays, not lists of numbers."
        )
    order = jax.device_get(_order(counts[0], batch_size, key))
    return _gather(data, order, batch_size, drop_remainder)


def _gather(data, order, batch_size, drop_remainder):
    end = len(order) - (len(order) % batch_size if drop_remainder else 0)
    for start in range(0, end, batch_size):
        chosen = order[start : start + batch_size]
        yield jax.tree.map(lambda leaf: leaf[chosen], data)


def _order(n, batch_size, key):
    whole = all(isinstance(x, (int, np.integer)) for x in (n, batch_size))
    if not whole or not 1 <= batch_size <= n:
        raise ValueError(
            f"A batch holds some of the examples, got batch_size={batch_size!r} expected 1 to {n}, "
            "the number of examples."
        )
    order = jnp.arange(n, dtype=jnp.int32)
    return order if key is None else jax.random.permutation(key, order)
