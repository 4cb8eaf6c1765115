"""The training step and the epoch: forward, loss, backward, update in one dispatch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_map

from fbprop.optim.chain import apply_updates, check_optimizer, hold, is_freezing, with_extra
from fbprop.reverse import value_and_grad
from fbprop.table import Table
from fbprop.train.state import State


def step(loss: Callable, optimizer, *, rules: Table | None = None,
         fallback: str | None = None) -> Callable:
    """One jitted training step, ``(state, batch) -> (state, metrics)``.

    The gradient is `fbprop.value_and_grad`'s. The old state's buffers are donated: its arrays are
    gone after the call, and the new ones take their memory.

    Args:
      loss: ``(params, batch, key) -> scalar`` or ``(scalar, metrics)``, metrics a dict of arrays;
        ``key`` is this step's own.
      optimizer: fbprop's or Optax's. Parameters it freezes (`fbprop.optim.freeze`) are not
        differentiated at all.
      rules, fallback: as for `fbprop.vjp`.

    Returns:
      The function. ``metrics`` is the dict that ``loss`` returned, and ``"loss"``, the loss before
      the update.

    Raises:
      TypeError: ``optimizer`` is no optimiser; ``loss`` returns something else.
      ValueError: ``loss`` calls one of its metrics "loss".

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim, train
      >>> def loss(params, batch, key):
      ...     x, y = batch
      ...     return jnp.mean((x @ params["w"] - y) ** 2)
      >>> optimizer = optim.adam(0.1)
      >>> state = train.init({"w": jnp.zeros(2)}, optimizer)
      >>> step = train.step(loss, optimizer)
      >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, -1.0])
      >>> for _ in range(100):
      ...     state, metrics = step(state, batch)
      >>> int(state.step), bool(metrics["loss"] < 1e-3)
      (100, True)
    """
    return jax.jit(_one_step(loss, optimizer, rules, fallback), donate_argnums=0)


def epoch(loss: Callable, optimizer, *, rules: Table | None = None,
          fallback: str | None = None) -> Callable:
    """Many training steps in one dispatch, ``(state, data, indices) -> (state, metrics)``.

    A `jax.lax.scan` over ``indices``: each step gathers its batch from data that stay on the
    device, so nothing returns to Python in between. As `step` otherwise.

    Args:
      loss, optimizer, rules, fallback: see `step`.

    Returns:
      A jitted function of ``state`` (donated), ``data``, a pytree of arrays with examples along
      their first axis, and ``indices``, integers [steps, batch] (or [steps], for ``data`` that is
      batched already); it returns the state and the metrics of every step, stacked.

    Raises:
      ValueError: ``indices`` or ``data`` of another form.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import optim, train
      >>> def loss(params, batch, key):
      ...     return jnp.mean((params["mean"] - batch) ** 2)
      >>> optimizer = optim.sgd(0.1)
      >>> state = train.init({"mean": jnp.zeros(())}, optimizer)
      >>> data = jnp.arange(12.0)
      >>> indices = jax.random.permutation(jax.random.key(1), 12).reshape(4, 3)
      >>> state, metrics = train.epoch(loss, optimizer)(state, data, indices)
      >>> metrics["loss"].shape
      (4,)
    """
    one = _one_step(loss, optimizer, rules, fallback)

    def run(state, data, indices):
        _check_data(data, indices)
        return lax.scan(lambda s, rows: one(s, tree_map(lambda x: x[rows], data)), state, indices)

    return jax.jit(run, donate_argnums=0)


def _one_step(loss, optimizer, rules, fallback):
    check_optimizer(optimizer)
    update_of = with_extra(optimizer)

    def one(state: State, batch):
        key = jax.random.fold_in(state.key, state.step)
        held = _trainable(optimizer, state.params)

        def of_trainable(params):
            return _with_metrics(loss(_fill(params, state.params), batch, key))

        (value, metrics), grads = value_and_grad(
            of_trainable, has_aux=True, rules=rules, fallback=fallback
        )(held)
        updates, opt_state = update_of(grads, state.opt_state, held, value=value)
        params = apply_updates(state.params, updates)
        return State(params, opt_state, state.step + 1, state.key), {"loss": value, **metrics}

    return one


def _trainable(optimizer, params):
    """The parameters with None in place of the frozen ones."""
    if not is_freezing(optimizer):
        return params
    return hold(optimizer.trainable(params), params)


def _fill(params, full):
    """The holes of ``params`` filled from ``full``."""
    return tree_map(lambda p, f: f if p is None else p, params, full, is_leaf=lambda p: p is None)


def _with_metrics(out):
    value, metrics = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    if not isinstance(metrics, dict) or isinstance(value, (tuple, list, dict)):
        raise TypeError(
            f"A loss returns a scalar or (scalar, dict of metrics), got {_kinds(out)} expected "
            "one of these: put what you want reported into the dict."
        )
    if "loss" in metrics:
        raise ValueError(
            'metrics["loss"] is the loss itself, got a metric of that name from the loss function; '
            "expected another name: rename it."
        )
    return value, metrics


def _kinds(out):
    if isinstance(out, tuple):
        return f"({', '.join(type(x).__name__ for x in out)})"
    return type(out).__name__


def _check_data(data, indices):
    if indices.ndim not in (1, 2) or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices are integers [steps, batch], got {jax.typeof(indices).str_short()}; "
            "expected e.g. jax.random.permutation(key, n)[:steps * batch].reshape(steps, batch)."
        )
    sizes = {x.shape[0] if x.ndim else None for x in jax.tree.leaves(data)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "All arrays of data have the examples along their first axis, got first axes "
            f"{sorted(map(str, sizes))} expected one length."
        )
