"""Running averages of the parameters, for evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.optim.arguments import check_alike, check_decay, check_state
from fbprop.optim.chain import apply_updates
from fbprop.optim.transform import (
    Optimizer,
    check_params,
    increment,
    part,
    scaled,
    wide,
    zero_count,
)


class AverageState(NamedTuple):
    """Updates done, and the average so far, float32 at least."""

    count: jax.Array
    average: Any


def average_params(decay: float = 0.999, warmup: bool = False) -> Optimizer:
    """Keeps an exponential moving average of the parameters; passes updates through unchanged.

    a ← d a + (1 − d) p, p the parameters after the update; a₀ = p₀. Put it last in a chain, and
    read the average with `averaged_params`. Polyak and Juditsky 1992; Optax:
    ``incremental_update(params, average, 1 - decay)``; PyTorch: ``AveragedModel`` with
    ``get_ema_multi_avg_fn(decay)``, which starts from the parameters after its first update.

    Args:
      decay: d in [0, 1).
      warmup: d = min(decay, (1 + t) / (10 + t)) after t updates, so that a short run forgets its
        start (TensorFlow's ``num_updates``).

    Raises:
      ValueError: ``decay`` outside its range, or ``update`` called without params.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.chain(optim.sgd(1.0), optim.average_params(0.5))
      >>> params = jnp.array(4.0)
      >>> updates, state = optimizer.update(jnp.array(2.0), optimizer.init(params), params)
      >>> float(optim.averaged_params(state, params))
      3.0
    """
    check_decay("decay", decay)

    def init(params):
        return AverageState(zero_count(), tree_map(lambda p: jnp.array(wide(p), copy=True), params))

    def update(updates, state, params=None, **extra):
        check_params(params, "average_params")
        check_state(state, AverageState)
        check_alike(params, state.average, "The parameters", "those that init saw")
        t = state.count.astype(jnp.result_type(float))
        # 1 − d, without the cancellation of a d near 1.
        share = jnp.maximum(1 - decay, 9 / (10 + t)) if warmup else jnp.asarray(1 - decay)
        new = apply_updates(params, updates)

        def one(a, p):
            return a + scaled(wide(p).astype(a.dtype) - a, share)

        return updates, AverageState(increment(state.count), tree_map(one, state.average, new))

    return part(init, update)


def averaged_params(opt_state, params):
    """The average that `average_params` keeps, in the dtypes of ``params``.

    Args:
      opt_state: state of an optimiser with `average_params` somewhere inside.
      params: the parameters; frozen ones, which have no average, are taken from here.

    Raises:
      ValueError: no `average_params` in ``opt_state``, or more than one.

    Example: see `average_params`.
    """
    def is_average(x):
        return isinstance(x, AverageState)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(s)]
    if len(found) != 1:
        raise ValueError(
            f"averaged_params reads the state of one average_params, got {len(found)} in opt_state "
            "expected 1: chain(..., optim.average_params(decay)) keeps an average."
        )
    return tree_map(
        lambda a, p: p if a is None else a.astype(p.dtype), found[0].average, params,
        is_leaf=lambda a: a is None,
    )
