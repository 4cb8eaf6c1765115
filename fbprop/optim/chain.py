"""Optimisers put together: in a chain, or for a part of the parameters only."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.core.factored import dense
from fbprop.optim.arguments import check_alike, check_state
from fbprop.optim.transform import Optimizer, part, takes_factored, wide


class Freezing(Optimizer):
    """An optimiser that leaves some parameters alone, and can say which before any gradient.

    ``trainable(params)`` is a pytree of bools. `fbprop.train.step` differentiates with respect to
    the trainable ones only.
    """

    def __new__(cls, init, update, trainable):
        self = super().__new__(cls, init, update)
        self.trainable = trainable
        return self


def chain(*optimizers) -> Optimizer:
    """One optimiser that applies others in order, each to the updates of the one before.

    Args:
      *optimizers: fbprop's or Optax's, or their parts.

    Returns:
      An `Optimizer` whose state is the tuple of theirs, and whose updates have the dtypes of the
      parameters (of the gradients, when ``update`` gets no params).

    Raises:
      TypeError: for something without ``init`` and ``update``.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> clipped = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))
      >>> updates, _ = clipped.update(jnp.array([3.0, 4.0]), clipped.init(jnp.zeros(2)))
      >>> [round(float(u), 3) for u in updates]
      [-0.06, -0.08]
    """
    for optimizer in optimizers:
        check_optimizer(optimizer)
    updates_of = [with_extra(optimizer) for optimizer in optimizers]
    factored = bool(optimizers) and takes_factored(optimizers[0])

    def init(params):
        return tuple(optimizer.init(params) for optimizer in optimizers)

    def update(grads, state, params=None, **extra):
        check_state(state, tuple)
        if len(state) != len(optimizers):
            raise ValueError(
                f"A chain's state has one part per member, got {len(state)} expected "
                f"{len(optimizers)}: use the state that this chain's init returned."
            )
        updates, states = grads, []
        for one, old in zip(updates_of, state):
            updates, new = one(updates, old, params, **extra)
            states.append(new)
        return cast_like(updates, grads if params is None else params), tuple(states)

    plain = part(init, update, takes_factored=factored)
    masks = [optimizer.trainable for optimizer in optimizers if is_freezing(optimizer)]
    if not masks:
        return plain
    # Every member, not the freezing one alone, is kept from the frozen parameters.
    return holding(plain, lambda params: tree_map(lambda *t: all(t), *(m(params) for m in masks)))


def holding(optimizer, trainable: Callable) -> Freezing:
    """``optimizer`` for the trainable parameters; it sees None in place of the others.

    A tree that has those holes already passes through unchanged, so that `fbprop.train.step` need
    not make gradients for them; otherwise their updates are 0.
    """
    inner = with_extra(optimizer)

    def init(params):
        return optimizer.init(hold(trainable(params), params))

    def update(grads, state, params=None, **extra):
        grads = dense(grads)
        if params is not None:
            check_alike(grads, params, "Gradients", "the parameters")
        mask = trainable(grads)
        held = None if params is None else hold(mask, params)
        updates, state = inner(hold(mask, grads), state, held, **extra)
        full = tree_map(lambda t, u, g: u if t else jnp.zeros_like(g), mask, updates, grads)
        return full, state

    return Freezing(init, update, trainable)


def hold(mask, tree):
    """The leaves where ``mask`` is True; None in place of the others."""
    return tree_map(lambda chosen, x: x if chosen else None, mask, tree)


def cast_like(updates, like):
    """Updates in the dtypes of ``like``, a tree of the same structure."""
    return tree_map(lambda u, x: u.astype(x.dtype), updates, like)


def is_freezing(optimizer) -> bool:
    return isinstance(optimizer, Freezing)


def check_optimizer(optimizer):
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"An optimiser is a pair (init, update), got {type(optimizer).__name__} expected "
            "fbprop.optim.Optimizer or an Optax transformation, such as fbprop.optim.adam(1e-3)."
        )


def with_extra(optimizer) -> Callable:
    """Its ``update``, made to accept and drop the extra arguments it does not name."""
    parameters = inspect.signature(optimizer.update).parameters.values()
    names = {p.name for p in parameters}
    all_others = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if all_others and ("of_batch" in names or isinstance(optimizer, Optimizer)):
        return optimizer.update

    def update(grads, state, params=None, **extra):
        # Optax's line searches refuse what they do not know, as `of_batch`, fbprop's own.
        extra = {name: value for name, value in extra.items()
                 if name in names or (all_others and name != "of_batch")}
        return optimizer.update(grads, state, params, **extra)

    return update


def apply_updates(params, updates):
    """params + updates, in the parameters' dtypes.

    Args:
      params: a pytree of arrays.
      updates: the same structure, from an optimiser; None in place of a leaf leaves it unchanged.

    Raises:
      ValueError: updates of another form.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optim.apply_updates([jnp.ones(2), jnp.ones(1)], [-jnp.ones(2), None])
      [Array([0., 0.], dtype=float32), Array([1.], dtype=float32)]
    """
    def one(u, p):
        if u is None:
            return p
        p = jnp.asarray(p)
        return (wide(p) + jnp.asarray(u).astype(wide(p).dtype)).astype(p.dtype)

    def is_none(x):
        return x is None

    try:
        full = tree_map(lambda u, p: p if u is None else u, updates, params, is_leaf=is_none)
    except ValueError:
        full = updates
    check_alike(full, params, "Updates", "the parameters")
    return tree_map(one, updates, params, is_leaf=is_none)
