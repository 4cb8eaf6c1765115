"""Choosing parameters by path: masks, an optimiser per path, frozen parameters.

A parameter's path is its keys in the pytree joined by ``/``: ``"encoder/0/w"``. Patterns are
shell-style and case-sensitive, as those of `fbprop.Table.override`: ``*`` matches any characters,
``/`` among them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_map, tree_unflatten

from fbprop.core.factored import dense
from fbprop.optim.arguments import check_alike, check_state
from fbprop.optim.chain import check_optimizer, hold, holding, is_freezing, with_extra
from fbprop.optim.transform import Optimizer


def _is_none(x):
    return x is None


def paths(params):
    """The paths of a pytree's leaves, as a pytree.

    Example:
      >>> from fbprop import optim
      >>> optim.paths({"dense": {"w": 1.0, "b": 2.0}, "scale": [3.0]})
      {'dense': {'b': 'dense/b', 'w': 'dense/w'}, 'scale': ['scale/0']}
    """
    found, tree = tree_flatten_with_path(params)
    return tree_unflatten(tree, [keystr(path, simple=True, separator="/") for path, _ in found])


def select(where, params):
    """Which leaves are meant, as a pytree of Python bools with the structure of ``params``.

    Args:
      where: a pattern or a list or tuple of patterns on paths; a pytree of bools, or a prefix of
        one; or a function from ``params`` to such a pytree (Optax's masks).
      params: a pytree.

    Raises:
      ValueError: a pattern that matches no path, or bools in another tree.

    Example:
      >>> from fbprop import optim
      >>> optim.select("*/w", {"dense": {"w": 1.0, "b": 2.0}})
      {'dense': {'b': False, 'w': True}}
    """
    patterns = (where,) if isinstance(where, str) else where
    if isinstance(patterns, (list, tuple)) and all(isinstance(p, str) for p in patterns):
        return _matching(patterns, params)
    mask = where(params) if callable(where) else where
    if all(isinstance(m, (bool, np.bool)) for m in jax.tree.leaves(mask)):
        try:
            return tree_map(lambda m, part: tree_map(lambda _: bool(m), part), mask, params)
        except ValueError:
            pass  # another tree
    raise ValueError(
        f"Parameters are chosen by patterns on paths or a tree of bools, got {mask!r} expected one "
        f"for the paths {jax.tree.leaves(paths(params))[:20]}: a pattern such as '*/w', or bools "
        "in the form of the parameters."
    )


def _matching(patterns, params):
    # A hole (None, a parameter that is frozen or another group's) still has a path.
    found, _ = tree_flatten_with_path(params, is_leaf=_is_none)
    names = [keystr(path, simple=True, separator="/") for path, _ in found]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"A pattern selects at least one parameter, got {pattern!r}, which matches none; "
                f"expected it to match one of {names[:20]}."
            )
    return tree_map(lambda n: any(fnmatch.fnmatchcase(n, p) for p in patterns), paths(params))


def by_path(optimizers: Mapping[str, Optimizer | None]) -> Optimizer:
    """Another optimiser, or learning rate, for each group of parameters.

    Args:
      optimizers: pattern -> optimiser, or None to freeze. Every parameter belongs to the first
        pattern that matches its path. Each optimiser sees its own parameters only, so clipping by
        the global norm inside one concerns its group; outside, in a chain, all.

    Returns:
      An optimiser whose state is the tuple of the groups' states. With frozen parameters, their
      updates are 0, and `fbprop.train.step` does no backward work for them.

    Raises:
      ValueError: a pattern matches no parameter, or a parameter no pattern.
      TypeError: no dict, or an empty one; no optimiser.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.by_path({"embed": None, "head/*": optim.sgd(1.0), "*": optim.sgd(0.1)})
      >>> params = {"embed": jnp.ones(()), "body": jnp.ones(()), "head": {"w": jnp.ones(())}}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> {k: float(v) for k, v in optim.apply_updates(params, updates).items() if k != "head"}
      {'body': 0.8999999761581421, 'embed': 1.0}
    """
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise TypeError(
            f"Groups are a dict from pattern to optimiser, got {optimizers!r} expected e.g. "
            '{"head/*": optim.adam(1e-3), "*": None}.'
        )
    groups = list(optimizers.items())
    live = grouped(groups)
    if all(optimizer is not None and not is_freezing(optimizer) for _, optimizer in groups):
        return live

    def trainable(params):
        which = _labels(groups, params)
        parts = [_trainable(o, _part(which, k, params)) for k, (_, o) in enumerate(groups)]
        return _merge(which, parts)

    return holding(live, trainable)


def freeze(optimizer, where) -> Optimizer:
    """``optimizer`` for all parameters but those chosen by ``where``, which never change.

    Args:
      optimizer: fbprop's or Optax's.
      where: pattern(s), pytree of bools (True: frozen), or function to one; see `select`.

    Returns:
      An optimiser without state for the frozen parameters. In `fbprop.train.step` they cost no
      backward work: the loss is differentiated with respect to the others only. In any other loop
      their updates are 0.

    Raises:
      ValueError: a pattern that matches no path.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.freeze(optim.sgd(1.0), "encoder/*")
      >>> params = {"encoder": {"w": jnp.ones(2)}, "head": jnp.ones(2)}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> updates["encoder"]["w"].tolist(), updates["head"].tolist()
      ([0.0, 0.0], [-1.0, -1.0])
    """
    check_optimizer(optimizer)

    def trainable(params):
        mask = tree_map(lambda frozen: not frozen, select(where, params))
        inner = _trainable(optimizer, hold(mask, params))
        return tree_map(lambda mine, t: bool(mine and t), mask, inner)

    return holding(optimizer, trainable)


def grouped(groups) -> Optimizer:
    """An optimiser from (where, optimiser or None) pairs; a leaf belongs to the first it fits.

    Only `holding` keeps leaves away from a None.
    """
    optimizers = [optimizer for _, optimizer in groups]
    for optimizer in optimizers:
        if optimizer is not None:
            check_optimizer(optimizer)
    update_of = [o and with_extra(o) for o in optimizers]

    def init(params):
        which = _labels(groups, params)
        return tuple(o.init(_part(which, k, params)) if o else () for k, o in enumerate(optimizers))

    def update(grads, state, params=None, **extra):
        grads = dense(grads)
        check_state(state, tuple)
        if params is not None:
            check_alike(grads, params, "Gradients", "the parameters")
        which = _labels(groups, grads)
        parts, states = [], []
        for k, (one, old) in enumerate(zip(update_of, state)):
            part = _part(which, k, grads)
            if one is not None:
                mine = None if params is None else _part(which, k, params)
                part, old = one(part, old, mine, **_extra_of(which, k, params, extra))
            parts.append(part)
            states.append(old)
        return _merge(which, parts), tuple(states)

    return Optimizer(init, update)


def _extra_of(which, k, params, extra):
    """What group ``k`` gets besides: its part of the gradient, and a line search over its own."""
    mine = dict(extra)
    if "grad" in extra:
        mine["grad"] = _part(which, k, extra["grad"])
    if "value_fn" in extra and params is not None:
        def value_fn(part):
            full = tree_map(lambda group, p, q: q if group == k else p, which, params, part)
            return extra["value_fn"](full)

        mine["value_fn"] = value_fn
    return mine


def _labels(groups, params):
    """The number of each leaf's group, in a tree like ``params``."""
    masks = [jax.tree.leaves(select(where, params)) for where, _ in groups]
    chosen = [next((k for k, mine in enumerate(leaf) if mine), None) for leaf in zip(*masks)]
    if None in chosen:
        path = jax.tree.leaves(paths(params))[chosen.index(None)]
        raise ValueError(
            f"Every parameter belongs to a group, got {path!r}, which no pattern matches; expected "
            "a match: add '*' as the last pattern, with None to freeze the rest."
        )
    return tree_unflatten(jax.tree.structure(params), chosen)


def _part(which, k, tree):
    """The leaves of group ``k``; None in place of the others."""
    return tree_map(lambda group, x: x if group == k else None, which, tree)


def _merge(which, parts):
    """The inverse of `_part`: each leaf from its own group's tree."""
    return tree_map(lambda group, *leaves: leaves[group], which, *parts)


def _trainable(optimizer, params):
    if is_freezing(optimizer):
        return optimizer.trainable(params)
    return tree_map(lambda _: optimizer is not None, params)
