"""What a training run is between two steps: one pytree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fbprop.optim.chain import check_optimizer


class State(NamedTuple):
    """Everything a step reads and writes besides the batch.

    Attributes:
      params: pytree of arrays.
      opt_state: the optimiser's state.
      step: updates done, int32 [].
      key: the run's random key, the same throughout; step t uses ``fold_in(key, t)``, so a run
        resumed at t draws what an uninterrupted one would.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


def init(params, optimizer, key: jax.Array | None = None) -> State:
    """The state before the first step.

    Args:
      params: pytree of arrays. They are copied: steps donate the state's buffers, and the caller's
        arrays stay alive.
      optimizer: fbprop's or Optax's.
      key: from `jax.random.key` (or a uint32 key of the old kind); None: ``jax.random.key(0)``.

    Raises:
      TypeError: ``optimizer`` is no optimiser.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim, train
      >>> state = train.init({"w": jnp.ones(3)}, optim.sgd(0.1))
      >>> int(state.step)
      0
    """
    check_optimizer(optimizer)
    key = jax.random.key(0) if key is None else key
    params = jax.tree.map(_fresh, params)
    opt_state = jax.tree.map(_fresh, optimizer.init(params))
    return State(params, opt_state, jnp.zeros((), jnp.int32), _fresh(key))


def _fresh(x):
    """A copy with a buffer of its own, without the weak type that would make step 2 recompile."""
    return jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True)
