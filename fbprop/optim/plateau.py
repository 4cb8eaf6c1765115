"""Smaller steps when the loss stops falling."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.optim.arguments import check_count, check_least, check_state, passes
from fbprop.optim.transform import Optimizer, part, scaled, zero_count


class PlateauState(NamedTuple):
    """Scalars: factor now, best value, windows without progress, windows of rest left, and the
    window being averaged (how many values, their sum)."""

    scale: jax.Array
    best: jax.Array
    stalled: jax.Array
    resting: jax.Array
    count: jax.Array
    total: jax.Array


def reduce_on_plateau(factor: float = 0.1, patience: int = 10, *, rtol: float = 1e-4,
                      atol: float = 0.0, cooldown: int = 0, accumulation_size: int = 1,
                      min_scale: float = 0.0) -> Optimizer:
    """Multiplies updates by a scale that falls when ``value`` has not improved for a while.

    The mean of every ``accumulation_size`` values is one reading. A reading below
    (1 − rtol) · best − atol is progress; after ``patience`` readings without, scale ← max(factor ·
    scale, min_scale), and the next ``cooldown`` readings count as nothing. Put it last in a chain.
    `fbprop.train.step` passes the loss as ``value``; elsewhere:
    ``update(grads, state, params, value=loss)``.

    Same as Optax's ``contrib.reduce_on_plateau``. PyTorch's ``ReduceLROnPlateau`` waits for one
    reading more (``patience`` + 1).

    Raises:
      ValueError: a value outside its range, or no ``value`` given to ``update``.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.chain(optim.sgd(1.0), optim.reduce_on_plateau(0.5, patience=2))
      >>> params = jnp.array(0.0)
      >>> state = optimizer.init(params)
      >>> for loss in (3.0, 3.0, 3.0):
      ...     updates, state = optimizer.update(jnp.array(1.0), state, params, value=loss)
      ...     print(float(updates))
      -1.0
      -1.0
      -0.5
    """
    _check(factor, patience, rtol, atol, accumulation_size, cooldown, min_scale)

    def init(params):
        one = jnp.ones((), jnp.result_type(float))
        return PlateauState(
            one, one * jnp.inf, zero_count(), zero_count(), zero_count(), jnp.zeros_like(one)
        )

    def read(s: PlateauState) -> PlateauState:
        """The state after a full window."""
        mean = s.total / accumulation_size
        progress = mean < (1 - rtol) * s.best - atol
        rest = s.resting > 0
        stalled = jnp.where(progress | rest, 0, s.stalled + 1)
        reduce = stalled >= patience
        return PlateauState(
            jnp.where(reduce, jnp.maximum(s.scale * factor, min_scale), s.scale),
            jnp.where(progress, mean, s.best),
            jnp.where(reduce, 0, stalled),
            jnp.where(rest, s.resting - 1, jnp.where(reduce, cooldown, 0)),
            zero_count(),
            jnp.zeros_like(s.total),
        )

    def update(updates, state, params=None, *, value=None, **extra):
        if value is None:
            raise ValueError(
                "reduce_on_plateau watches the loss, got no value; expected "
                "update(grads, state, params, value=loss), as fbprop.train.step calls it."
            )
        check_state(state, PlateauState)
        value = jnp.asarray(value).astype(state.total.dtype)
        state = state._replace(count=state.count + 1, total=state.total + value)
        full = state.count == accumulation_size
        state = tree_map(lambda new, old: jnp.where(full, new, old), read(state), state)
        return tree_map(lambda u: scaled(u, state.scale), updates), state

    return part(init, update)


def _check(factor, patience, rtol, atol, accumulation_size, cooldown, min_scale):
    check_count("cooldown", cooldown, least=0)
    check_least(rtol=rtol, atol=atol, min_scale=min_scale)
    if not passes("factor", factor, lambda v: 0 < v < 1):
        raise ValueError(f"A plateau shortens steps, got factor={factor} expected 0 < factor < 1.")
    check_count("patience", patience)
    check_count("accumulation_size", accumulation_size)
    if rtol > 1 or rtol == atol == 0:
        raise ValueError(
            f"Progress has a least size, got rtol={rtol}, atol={atol} expected 0 <= rtol <= 1 and "
            "atol >= 0, one of them positive."
        )
