"""Metrics and predictions over a whole data set, its last short batch included."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_map

from fbprop.data.batching import count_examples
from fbprop.optim.arguments import check_count
from fbprop.optim.objective import Weighted, number


def evaluate(metric: Callable, batch_size: int = 256) -> Callable:
    """One jitted function ``(params, data) -> metrics``, each averaged over all examples.

    Args:
      metric: ``(params, batch) -> pytree of arrays``: means over the batch, or one value per
        example [batch] (0-d or 1-d). Means of the last, shorter batch count by its size; a
        `Weighted` by its weight. Further arguments of the returned function are passed on to it:
        a model state, say.
      batch_size: examples at a time, what memory allows; the result does not depend on it.

    Returns:
      The function. ``data`` is a pytree of arrays with examples along their first axis; the result
      has the structure of ``metric``'s, every leaf a scalar, float32 at least.

    Raises:
      ValueError: ``batch_size`` < 1, no data, arrays of different lengths, or a metric with more
        axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import train
      >>> accuracy = train.evaluate(lambda p, batch: {"accuracy": batch["x"] * p > 1}, batch_size=2)
      >>> float(accuracy(1.0, {"x": jnp.array([0.0, 2.0, 3.0, 4.0, 5.0])})["accuracy"])
      0.800000011920929
    """
    _check_batch_size(batch_size)

    def run(params, data, *more):
        return _means(_batch_by_batch(_totals(metric, params, more), data, batch_size))

    return jax.jit(run)


def evaluate_batches(metric: Callable) -> Callable:
    """As `evaluate`, for data that come in batches: ``(params, batches) -> metrics``.

    Args:
      metric: see `evaluate`.

    Returns:
      The function; ``batches`` is any iterable of pytrees of arrays, of equal or different sizes.

    Raises:
      ValueError: no batches, or a metric with more axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import train
      >>> mean = train.evaluate_batches(lambda params, batch: jnp.mean(batch))
      >>> float(mean(None, [jnp.array([1.0, 2.0]), jnp.array([6.0])]))
      3.0
    """
    totals = jax.jit(lambda params, batch, *more: _totals(metric, params, more)(batch))

    def run(params, batches, *more):
        parts = [totals(params, batch, *more) for batch in batches]
        if not parts:
            raise ValueError("An evaluation needs examples, got no batches expected at least one.")
        return _means(parts)

    return run


def predict(apply: Callable, batch_size: int = 256) -> Callable:
    """One jitted function ``(params, data) -> outputs`` for every example, batch by batch.

    Args:
      apply: ``(params, batch) -> pytree of arrays [batch, ...]``.
      batch_size: examples at a time.

    Returns:
      The function; its outputs have the examples of ``data`` along their first axis, in order.

    Raises:
      ValueError: as for `evaluate`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import train
      >>> double = train.predict(lambda p, x: p * x, batch_size=2)
      >>> double(2.0, jnp.array([1.0, 2.0, 3.0])).tolist()
      [2.0, 4.0, 6.0]
    """
    _check_batch_size(batch_size)

    def run(params, data):
        parts = _batch_by_batch(lambda batch: apply(params, batch), data, batch_size)
        return tree_map(lambda *xs: jnp.concatenate(xs), *parts)

    return jax.jit(run)


def _batch_by_batch(fun, data, batch_size):
    """``fun`` of every batch: results of the full ones, joined, and of a shorter last one."""
    steps, left = divmod(count_examples("data", data, least=1), batch_size)

    def one(i):
        return fun(
            tree_map(lambda x: lax.dynamic_slice_in_dim(x, i * batch_size, batch_size), data)
        )

    parts = []
    if steps:
        # Joined along the batch axis; what is a scalar per batch becomes a vector.
        stacked = lax.map(one, jnp.arange(steps))
        parts.append(tree_map(lambda x: x.reshape(-1, *x.shape[2:]), stacked))
    if left:
        parts.append(fun(tree_map(lambda x: x[steps * batch_size:], data)))
    return parts


def _totals(metric, params, more):
    """``batch -> metrics``, each as a `Weighted`."""
    def of(batch):
        n = count_examples("data", batch, least=1)
        return tree_map(lambda m: _total(m, n), metric(params, batch, *more), is_leaf=_is_weighted)

    return of


def _means(parts):
    """The metrics over all batches from every batch's `Weighted` ones (scalars, or joined)."""
    def one(*totals):
        return Weighted(*(sum(map(jnp.sum, column)) for column in zip(*totals))).mean

    return tree_map(one, *parts, is_leaf=_is_weighted)


def _is_weighted(m):
    return isinstance(m, Weighted)


def _total(m, n) -> Weighted:
    """The sum over the batch of a metric given as a mean, per example, or `Weighted`."""
    if _is_weighted(m):
        return Weighted(*map(number, m))
    m = jnp.asarray(m)
    if m.shape not in ((), (n,)):
        raise ValueError(
            f"A metric is a mean or one value per example, got shape {m.shape} expected () or "
            f"({n},): reduce the other axes, or use fbprop.train.predict for whole outputs."
        )
    m = number(m)
    return Weighted(jnp.sum(m) if m.ndim else m * n, jnp.full((), n, m.dtype))


def _check_batch_size(batch_size):
    check_count("batch_size", batch_size)
