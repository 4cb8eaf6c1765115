"""What a training run is between two steps: one pytree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fbprop.optim.chain import check_optimizer
from fbprop.train.precision import LossScale


class State(NamedTuple):
    """Everything a step reads and writes besides the batch.

    Attributes:
      params: pytree of arrays.
      opt_state: the optimiser's state.
      step: updates done, int32 []; 2³¹ − 1 stays what it is, as optimisers' counts do.
      key: the run's random key, the same throughout; step t uses ``fold_in(key, t)``, so a run
        resumed at t draws what an uninterrupted one would.
      model_state: what the model carries from step to step besides parameters, such as running
        statistics: any pytree of arrays; None without.
      loss_scale: a `LossScale` for float16, or None.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    model_state: Any = None
    loss_scale: LossScale | None = None


def init(params, optimizer, key: jax.Array | None = None, *, model_state=None,
         loss_scale: LossScale | None = None) -> State:
    """The state before the first step.

    Args:
      params: pytree of arrays. They are copied: steps donate the state's buffers, and the caller's
        arrays stay alive.
      optimizer: fbprop's or Optax's.
      key: from `jax.random.key` (or a uint32 key of the old kind); None: ``jax.random.key(0)``.
      model_state: pytree of arrays that the loss receives and returns, or None; copied as well.
      loss_scale: `fbprop.train.loss_scale` for float16; None: the loss is not scaled.

    Raises:
      TypeError: ``optimizer`` is no optimiser; something else is no array, key or loss scale.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim, train
      >>> state = train.init({"w": jnp.ones(3)}, optim.sgd(0.1))
      >>> int(state.step)
      0
    """
    check_optimizer(optimizer)
    key = jax.random.key(0) if key is None else key
    if not (hasattr(key, "dtype") and (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim)):
        raise TypeError(
            f"A run has a random key, got {key!r} expected one from jax.random.key(seed)."
        )
    if not isinstance(loss_scale, (LossScale, type(None))):
        raise TypeError(
            f"A loss scale changes during a run, got {loss_scale!r} expected "
            "fbprop.train.loss_scale(initial), or None."
        )
    params = jax.tree.map(_fresh, params)
    opt_state = jax.tree.map(_fresh, optimizer.init(params))
    return State(
        params, opt_state, jnp.zeros((), jnp.int32), _fresh(key),
        jax.tree.map(_fresh, model_state), jax.tree.map(_fresh, loss_scale),
    )


def check_is_state(state):
    if not isinstance(state, State):
        raise TypeError(
            f"A step goes from state to state, got {type(state).__name__} expected "
            "fbprop.train.State: fbprop.train.init(params, optimizer) makes the first."
        )


def _fresh(x):
    """A copy with a buffer of its own, without the weak type that would make step 2 recompile."""
    if not isinstance(x, (jax.typing.ArrayLike, list)):
        raise TypeError(
            f"A state is a pytree of arrays, got a leaf {x!r} of type {type(x).__name__} expected "
            "arrays or numbers: keep what is none outside."
        )
    return jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True)
