"""The learning-rate range test: one short run with a rate that grows until the loss bursts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import tree_map

from fbprop.core.table import Table
from fbprop.data.batching import count_examples
from fbprop.optim.arguments import check_count, passes
from fbprop.optim.chain import apply_updates
from fbprop.optim.objective import call_loss, mean_of
from fbprop.optim.schedules import exponential
from fbprop.optim.sgd import sgd
from fbprop.reverse import value_and_grad


class RangeTest(NamedTuple):
    """What a range test saw, up to where the loss diverged.

    Attributes:
      rates, losses: float64 [n], the rate of each step and the loss before it.
      smoothed: float64 [n], the losses' running average over about ten steps.
      suggestion: the rate where ``smoothed`` falls fastest; None if it never falls.
      diverged: the rate at which the loss was no longer finite, or four times its least; or None.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    diverged: float | None


def find_learning_rate(loss: Callable, params, data, *, optimizer: Callable = sgd,
                       lowest: float = 1e-6, highest: float = 10.0, steps: int = 100,
                       batch_size: int = 32, key: jax.Array | None = None, model_state=None,
                       rules: Table | None = None,
                       fallback: str | None = "registered") -> RangeTest:
    """Learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3).

    Trains a copy of ``params`` for ``steps`` steps on random batches, in one dispatch, while the
    rate grows geometrically from ``lowest`` to ``highest``.

    Args:
      loss: as for `fbprop.train.step`: ``(params, batch, key) -> scalar`` or ``(scalar, metrics)``.
      params: pytree of arrays; left as it is.
      data: pytree of arrays with examples along their first axis.
      optimizer: a function from learning rate to optimiser: ``optim.adam``, or a lambda.
      lowest, highest, steps: see above.
      batch_size: examples per step, drawn with replacement.
      key: random key for batches and loss; None: ``jax.random.key(0)``.
      model_state: what the loss receives and returns besides, see `fbprop.train.step`; or None.
      rules, fallback: as for `fbprop.vjp`.

    Returns:
      A `RangeTest`. Steps after a divergence are left out, so that no number in it is NaN.

    Raises:
      ValueError: unless 0 < lowest < highest and steps >= 3; data without examples or of several
        lengths.   TypeError: no numbers; ``optimizer`` is no function.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> def loss(params, batch, key):
      ...     return jnp.mean((params - batch) ** 2)
      >>> found = optim.find_learning_rate(loss, jnp.array(5.0), jnp.zeros(8))
      >>> 0.01 < found.suggestion < 1 < found.diverged
      True
    """
    _check(optimizer, data, batch_size, steps)
    in_order = passes("lowest", lowest, lambda v: 0 < v < math.inf) and passes(
        "highest", highest, lambda v: lowest < v < math.inf
    )
    if not in_order or steps < 3:
        raise ValueError(
            f"A range test goes from a low rate to a high one, got lowest={lowest}, "
            f"highest={highest}, steps={steps} expected 0 < lowest < highest and steps >= 3."
        )
    tested = optimizer(exponential(lowest, highest / lowest, steps - 1))
    of_batches, of_loss = jax.random.split(jax.random.key(0) if key is None else key)

    def scalar(params, *rest):
        out = call_loss(loss, params, *rest)
        return mean_of(out.value), out.model_state

    def one(carry, at):
        (params, state, model_state), (rows, count) = carry, at
        batch = tree_map(lambda x: jnp.asarray(x)[rows], data)
        (value, model_state), grads = value_and_grad(
            scalar, has_aux=True, rules=rules, fallback=fallback
        )(params, batch, jax.random.fold_in(of_loss, count), model_state)
        updates, state = tested.update(grads, state, params)
        return (apply_updates(params, updates), state, model_state), value

    @jax.jit
    def run(params):
        n = jax.tree.leaves(data)[0].shape[0]
        rows = jax.random.randint(of_batches, (steps, batch_size), 0, n)
        start = params, tested.init(params), model_state
        return lax.scan(one, start, (rows, jnp.arange(steps)))[1]

    rates = lowest * (highest / lowest) ** (np.arange(steps) / (steps - 1))
    params = tree_map(jnp.asarray, params)
    return _read(rates, np.asarray(run(params), np.float64))


def _check(optimizer, data, batch_size, steps):
    check_count("batch_size", batch_size)
    check_count("steps", steps, least=0)
    if not callable(optimizer):
        raise TypeError(
            f"A range test makes the optimiser for its rate, got {type(optimizer).__name__} "
            "expected a function from learning rate to optimiser: optim.adam, or a lambda."
        )
    count_examples("data", data, least=1)


def _read(rates, losses) -> RangeTest:
    """Cut the curve where it diverges, and find where it falls fastest."""
    smoothed, average, best = [], 0.0, math.inf
    diverged = None
    for i, value in enumerate(losses):
        average = 0.9 * average + 0.1 * value
        corrected = average / (1 - 0.9 ** (i + 1))
        # Losses may be negative: four times the least only makes sense above 0.
        if not math.isfinite(value) or (best > 0 and corrected > 4 * best):
            diverged = float(rates[i])
            break
        best = min(best, corrected)
        smoothed.append(corrected)
    smoothed = np.asarray(smoothed)
    n = len(smoothed)
    suggestion = None
    if n >= 3:
        slope = np.gradient(smoothed)
        # Less than float32 resolves is not falling.
        if slope.min() < -np.finfo(np.float32).eps * np.abs(smoothed).max():
            suggestion = float(rates[int(slope.argmin())])
    return RangeTest(rates[:n], losses[:n], smoothed, suggestion, diverged)
