"""What a training run is between two steps: one pytree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fbprop.optim.chain import check_optimizer
from fbprop.train.placement import placement
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
      learning: the memory of a learning rule (`fbprop.learning`), or None for backpropagation.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    model_state: Any = None
    loss_scale: LossScale | None = None
    learning: Any = None


def init(params, optimizer, key: jax.Array | None = None, *, model_state=None,
         loss_scale: LossScale | None = None, mesh=None, layout=None, learning=None) -> State:
    """The state before the first step.

    Args:
      params: pytree of arrays. They are copied: steps donate the state's buffers, and the caller's
        arrays stay alive. Or a function that returns them: ``lambda: net.init(key, x)``; so they
        are made in parts on a mesh, where no device has room for all.
      optimizer: fbprop's or Optax's.
      key: from `jax.random.key` (or a uint32 key of the old kind); None: ``jax.random.key(0)``.
      model_state: pytree of arrays that the loss receives and returns, or None; copied as well.
      loss_scale: `fbprop.train.loss_scale` for float16; None: the loss is not scaled.
      mesh: a `jax.sharding.Mesh` to lay the state out on; None: the default device. Its axes count
        as Auto, whatever their type, also where it is set (`jax.set_mesh`).
      layout: where on it, see `fbprop.mesh.layout`; None: `fbprop.mesh.replicated`. The
        optimiser's state lies with its parameters; all else is whole on every device.
      learning: memory of the learning rule that `step` is given, from its ``init(key, loss, params,
        batch, key)``; copied as well. None: backpropagation.

    Raises:
      TypeError: ``optimizer`` is no optimiser; something else is no array, key, loss scale, mesh
        or layout.   ValueError: a layout that does not fit the parameters or the mesh.

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
    params, opt_state, rest = placement(mesh, layout).start(
        params, optimizer.init, (jnp.zeros((), jnp.int32), key, model_state, loss_scale, learning)
    )
    return State(params, opt_state, *rest)


def check_is_state(state):
    if not isinstance(state, State):
        raise TypeError(
            f"A step goes from state to state, got {type(state).__name__} expected "
            "fbprop.train.State: fbprop.train.init(params, optimizer) makes the first."
        )
