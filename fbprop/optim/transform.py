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

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.core.devices import by_platform
from fbprop.core.factored import Rows, dense, is_factored
from fbprop.core.precision import wide_dtype
from fbprop.optim.arguments import check_alike, check_state, numbers, passes, path_of

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


def part(init: Callable, update: Callable, *, takes_factored: bool = False) -> Optimizer:
    """An optimiser of these two, whose arguments are checked first.

    Args:
      init, update: as `Optimizer` has them. ``update`` gets gradients that are arrays, or
        unevaluated with ``takes_factored``, in a tree like that of the parameters.
    """
    def checked_init(params):
        return init(numbers(params, "a parameter"))

    def checked_update(grads, state, params=None, **extra):
        grads = numbers(grads if takes_factored else dense(grads), "a gradient")
        if params is not None:
            params = numbers(params, "a parameter")
            check_alike(grads, params, "Gradients", "the parameters")
        return update(grads, state, params, **extra)

    checked_update.takes_factored = takes_factored
    return Optimizer(checked_init, checked_update)


def zero_count() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def increment(count: jax.Array) -> jax.Array:
    """count + 1; the largest integer stays what it is."""
    return count + (count < jnp.iinfo(count.dtype).max).astype(count.dtype)


def wide(x: jax.Array) -> jax.Array:
    """``x`` in the dtype that moments are kept in: float32 for 16-bit and narrower floats."""
    return x.map(wide) if isinstance(x, Rows) else x.astype(wide_dtype(x.dtype))


def abs_squared(x: jax.Array) -> jax.Array:
    """|x|², real for complex ``x`` too."""
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else x * x


def zeros(p: jax.Array) -> jax.Array:
    """A slot's initial value: zeros like the parameter, wide."""
    return jnp.zeros(p.shape, wide_dtype(p.dtype))


def real_zeros(p: jax.Array) -> jax.Array:
    """As `zeros`, real for a complex parameter: for second moments."""
    return jnp.zeros(p.shape, jnp.finfo(wide_dtype(p.dtype)).dtype)


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
        check_state(state, LeafState)
        count = increment(state.count)
        scalars = per_dtype(per_step(count))
        leaves, tree = jax.tree.flatten(grads, is_leaf=is_factored)
        values = jax.tree.leaves(params) if params_needed else [None] * len(leaves)
        directions, news = [], []
        for g, p, mine in zip(leaves, values, _slots_of_leaves(grads, state.slots, slots)):
            rows = takes_rows and isinstance(g, Rows)
            g, p = wide(g if rows else dense(g)), None if p is None else wide(p)
            others = mine, scalars(g.dtype), p
            if rows:
                direction, new = by_platform(
                    g, *others, cpu=_of_merged(rule), default=_of_dense(rule)
                )
            else:
                direction, new = rule(g, *others)
            directions.append(direction)
            # Gradients wider than the parameters must not change the state's type.
            news.append(tree_map(lambda n, old: n.astype(old.dtype), new, mine))
        state = LeafState(count, {k: tree.unflatten([new[k] for new in news]) for k in slots})
        return tree.unflatten(directions), state

    return part(init, update, takes_factored=True)


def _of_merged(rule):
    """Of rows on CPUs: they are added where they belong, without a table of zeros."""
    return lambda g, *others: rule(g.merged(), *others)


def _of_dense(rule):
    """Of rows elsewhere, in one pass over the table: adding them to each slot takes three more.

    ``word_embedding_step`` moves 1.11 of what `jax.grad` and Optax move on an H100, 1.19 by rows.
    """
    return lambda g, *others: rule(g.dense(), *others)


def _slots_of_leaves(grads, kept, slots) -> list[dict[str, Any]]:
    """For each gradient its slots by name, out of the trees in the state."""
    leaves, tree = jax.tree.flatten(grads, is_leaf=is_factored)
    if set(kept) != set(slots):
        raise ValueError(
            f"An optimiser goes on from its own state, got one that keeps {sorted(kept)} expected "
            f"{sorted(slots)}: use init(params) of this very optimiser."
        )
    columns = []
    for name, first in slots.items():
        try:
            columns.append(tree.flatten_up_to(kept[name]))
        except ValueError:
            check_alike(grads, kept[name], "Gradients", "the parameters that init saw")
            raise
        for i, (g, slot) in enumerate(zip(leaves, columns[-1])):
            fresh = _form(first, tuple(g.shape), jnp.dtype(g.dtype))
            if [x.shape for x in jax.tree.leaves(slot)] != fresh:
                raise ValueError(
                    "Gradients have the form of the parameters that init saw, got "
                    f"{path_of(grads, i)!r} of shape {tuple(g.shape)} expected the one that its "
                    f"slot {name!r} was made for: start from init(params) of the same model."
                )
    return [dict(zip(slots, mine)) for mine in zip(*columns)] or [{} for _ in leaves]


@functools.lru_cache
def _form(first, shape, dtype):
    """Shapes in a slot of a parameter."""
    return [x.shape for x in jax.tree.leaves(
        jax.eval_shape(first, jax.ShapeDtypeStruct(shape, dtype))
    )]


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
        done so far, int32 (0 at the first; 2³¹ − 1 stays what it is), as in Optax.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> descent = optim.scale_by_learning_rate(0.5)
      >>> updates, _ = descent.update(jnp.array([1.0, 2.0]), descent.init(jnp.zeros(2)))
      >>> updates.tolist()
      [-0.5, -1.0]
    """
    check_rate(learning_rate)
    scheduled = callable(learning_rate)

    def init(params):
        return CountState(zero_count()) if scheduled else ()

    def update(grads, state, params=None, **extra):
        check_state(state, CountState if scheduled else tuple)
        descent = -jnp.asarray(learning_rate(state.count) if scheduled else learning_rate)
        updates = tree_map(lambda u: scaled(u, descent), grads)
        return updates, CountState(increment(state.count)) if scheduled else ()

    return part(init, update)


def check_rate(learning_rate):
    if callable(learning_rate):
        return
    if not passes("A learning rate", learning_rate, lambda v: 0 <= v < float("inf")):
        raise ValueError(
            f"A learning rate is a step length, got {learning_rate} expected a number >= 0 or a "
            "schedule: the minus sign of descent is added for you."
        )


def scale(factor) -> Optimizer:
    """u ← factor · u.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> float(optim.scale(3.0).update(jnp.array(2.0), ())[0])
      6.0
    """
    if not passes("factor", factor, lambda v: abs(v) < float("inf")):
        raise ValueError(f"A factor is finite, got {factor=} expected a finite number.")
    return leafless(lambda u: scaled(u, jnp.asarray(factor)))


def leafless(fun: Callable) -> Optimizer:
    """A part without state: ``fun`` of each wide gradient."""
    return stateless(lambda grads: tree_map(lambda g: fun(wide(g)), grads))


def stateless(fun: Callable) -> Optimizer:
    """A part without state: ``fun`` of the gradients."""
    return part(
        lambda params: (), lambda grads, state, params=None, **extra: (fun(grads), state)
    )
