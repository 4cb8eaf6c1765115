"""What an optimiser is, and the few pieces that all of them are chained from.

An optimiser is a pair of pure functions with Optax's protocol::

    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    params = apply_updates(params, updates)         # params + updates

so that Optax's optimisers run in `fbprop.train` and these run in any Optax loop. The minus sign of
descent stands in one place, `scale_by_learning_rate`; everything before it in a chain works on
directions of ascent. Moments and directions of 16-bit parameters are float32; `chain` rounds once,
at its end, to the dtype of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.core.factored import Rows, dense, is_factored

Schedule = Callable[[jax.Array], Any]


class Optimizer(NamedTuple):
    """A pair of pure functions; a part of one (clipping, weight decay) has the same form.

    Attributes:
      init: ``params -> state``, a pytree of arrays.
      update: ``(grads, state, params=None, **extra) -> (updates, state)``; ``extra`` carries what
        only some optimisers want, ``value``, the loss, above all.
    """

    init: Callable
    update: Callable


class LeafState(NamedTuple):
    """State of a `leafwise` optimiser: updates done, and per name a tree like the parameters."""

    count: jax.Array
    slots: dict[str, Any]


class CountState(NamedTuple):
    """State of a schedule: updates done."""

    count: jax.Array


def zero_count() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def wide(x: jax.Array) -> jax.Array:
    """``x`` in the dtype that moments are kept in: float32 for 16-bit and narrower floats."""
    return x.map(wide) if isinstance(x, Rows) else x.astype(_wide_dtype(x.dtype))


def _wide_dtype(dtype):
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else dtype


def abs_squared(x: jax.Array) -> jax.Array:
    """|x|², real for complex ``x`` too."""
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else x * x


def zeros(p: jax.Array) -> jax.Array:
    """A slot's initial value: zeros like the parameter, wide."""
    return jnp.zeros(p.shape, _wide_dtype(p.dtype))


def real_zeros(p: jax.Array) -> jax.Array:
    """As `zeros`, real for a complex parameter: for second moments."""
    return jnp.zeros(p.shape, jnp.finfo(_wide_dtype(p.dtype)).dtype)


def leafwise(rule: Callable, slots: dict[str, Callable] | None = None, *,
             per_step: Callable = lambda count: (), params_needed: str = "",
             takes_rows: bool = False) -> Optimizer:
    """An optimiser that treats every parameter by itself.

    Args:
      rule: ``(g, slots, scalars, p) -> (direction, slots)``, with ``slots`` a dict of this leaf's
        slots, g, p and slots wide (`wide`), and scalars in g's real dtype.
      slots: name -> function from a parameter to that slot's initial value.
      per_step: ``count -> scalars``, count >= 1: what depends on the step only, computed once.
      params_needed: the name to blame when ``update`` gets no params; empty if it needs none.
      takes_rows: whether g may be `fbprop.Rows`, no two of them at one place.

    Gradients may be unevaluated (``factored=True`` of `fbprop.grad`).
    """
    slots = slots or {}
    # One trace per shape instead of one per leaf: at 600 leaves of two shapes Adam's update is
    # traced and lowered in 0.3 s instead of 0.6 s. XLA inlines the calls.
    rule = jax.jit(_with_standard_promotion(rule))

    def init(params):
        return LeafState(zero_count(), {k: tree_map(f, params) for k, f in slots.items()})

    def update(grads, state, params=None, **extra):
        if params_needed:
            check_params(params, params_needed)
        count = state.count + 1
        scalars = per_dtype(per_step(count))
        leaves, tree = jax.tree.flatten(grads, is_leaf=is_factored)
        values = tree.flatten_up_to(params) if params is not None else [None] * len(leaves)
        columns = [tree.flatten_up_to(state.slots[k]) for k in slots]
        directions, news = [], []
        for g, p, *mine in zip(leaves, values, *columns):
            g = wide(g).merged() if takes_rows and isinstance(g, Rows) else wide(dense(g))
            p = wide(p) if params_needed else None
            direction, new = rule(g, dict(zip(slots, mine)), scalars(g.dtype), p)
            directions.append(direction)
            news.append(new)
        state = LeafState(count, {k: tree.unflatten([new[k] for new in news]) for k in slots})
        return tree.unflatten(directions), state

    update.takes_factored = True
    return Optimizer(init, update)


def takes_factored(optimizer) -> bool:
    """Whether gradients may be unevaluated (`fbprop.Rows`, `fbprop.Contraction`)."""
    return getattr(optimizer.update, "takes_factored", False)


def _with_standard_promotion(rule):
    """A complex leaf may then meet the real scalars and second moments of its own precision."""
    def run(g, slots, scalars, p):
        with jax.numpy_dtype_promotion("standard"):
            return rule(g, slots, scalars, p)

    return run


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``factor`` times ``x``, wide."""
    x = wide(x)
    return x * factor.astype(x.dtype)


def per_dtype(scalars) -> Callable:
    """``dtype -> scalars`` in that dtype's real dtype, each conversion made once."""
    known = {}

    def converted(dtype):
        real = jnp.finfo(dtype).dtype
        if real not in known:
            known[real] = tree_map(lambda s: jnp.asarray(s).astype(real), scalars)
        return known[real]

    return converted


def check_params(params, name):
    if params is None:
        raise ValueError(
            f"{name} reads the parameters, got params=None expected their pytree: call "
            "update(grads, state, params)."
        )


def scale_by_learning_rate(learning_rate) -> Optimizer:
    """u ← −α(t) u: the one place where ascent becomes descent.

    Args:
      learning_rate: a number, a scalar array, or a schedule, called with the number of updates
        done so far (0 at the first), as in Optax.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> descent = optim.scale_by_learning_rate(0.5)
      >>> updates, _ = descent.update(jnp.array([1.0, 2.0]), descent.init(jnp.zeros(2)))
      >>> updates.tolist()
      [-0.5, -1.0]
    """
    check_rate(learning_rate)

    def init(params):
        return CountState(zero_count()) if callable(learning_rate) else ()

    def update(grads, state, params=None, **extra):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        descent = -jnp.asarray(rate)
        updates = tree_map(lambda u: scaled(u, descent), grads)
        return updates, CountState(state.count + 1) if callable(learning_rate) else ()

    return Optimizer(init, update)


def check_rate(learning_rate):
    if callable(learning_rate) or not isinstance(learning_rate, (int, float)):
        return
    if not 0 <= learning_rate < float("inf"):
        raise ValueError(
            f"A learning rate is a step length, got {learning_rate} expected a number >= 0 or a "
            "schedule: the minus sign of descent is added for you."
        )


def check_decay(name, value):
    """For decay rates of running averages."""
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} is the decay of a running average, got {value} expected 0 <= {name} < 1."
        )


def scale(factor) -> Optimizer:
    """u ← factor · u.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> float(optim.scale(3.0).update(jnp.array(2.0), ())[0])
      6.0
    """
    return leafless(lambda u: scaled(u, jnp.asarray(factor)))


def leafless(fun: Callable) -> Optimizer:
    """A part without state: ``fun`` of each wide gradient."""
    return Optimizer(
        lambda params: (),
        lambda grads, state, params=None, **extra: (tree_map(lambda g: fun(wide(g)), grads), state),
    )
