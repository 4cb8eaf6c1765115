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
    order = jax.device_get(_order(count_examples("data", data), batch_size, key))
    return _gather(data, order, batch_size, drop_remainder)


def count_examples(name, data, *, least=0, instead="") -> int:
    """How many examples arrays hold; an error if they do not agree, or are not arrays.

    Args:
      least: how few there may be.
      instead: what else the user may have meant, for the end of the sentence.
    """
    for path, leaf in jax.tree.leaves_with_path(data):
        if not np.ndim(leaf):
            kind = f"{leaf.dtype}[]" if hasattr(leaf, "dtype") else type(leaf).__name__
            raise ValueError(
                f"Arrays of {name} have the examples along their first axis, got {kind} as "
                f"{name}{jax.tree_util.keystr(path)} expected an array of one dimension or "
                f"more{instead}."
            )
    lengths = sorted({np.shape(leaf)[0] for leaf in jax.tree.leaves(data)})
    if len(lengths) != 1 or lengths[0] < least:
        wanted = f"one length >= {least}" if least else "one length"
        raise ValueError(
            f"Arrays of {name} have the examples along their first axis, got lengths {lengths} "
            f"expected {wanted}{instead}."
        )
    return lengths[0]


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
