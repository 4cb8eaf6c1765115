"""K-FAC: the gradient through the inverse of a Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_leaves, tree_map

from fbprop.optim.arguments import check_count, check_decay, check_least, check_state
from fbprop.optim.chain import chain
from fbprop.optim.transform import (
    Optimizer,
    increment,
    part,
    scale_by_learning_rate,
    wide,
    zero_count,
    zeros,
)


class KfacState(NamedTuple):
    """Updates done, the curvature's running average, its inverse, and the momentum."""

    count: jax.Array
    factors: Any
    inverses: Any
    momentum: Any


def scale_by_kfac(
    factors, *, curvature: Callable | None = None, damping: float = 1e-3, decay: float = 0.95,
    every: int = 10, momentum: float = 0.9, clip: float | None = 0.1,
) -> Optimizer:
    """The part of `kfac` before its learning rate; see there."""
    check_least(0, damping=damping)
    check_decay("decay", decay)
    check_decay("momentum", momentum)
    check_count("every", every)
    if clip is not None:
        check_least(0, clip=clip)

    def inverted(averages):
        return tree_map(lambda f: f.inverse(damping), averages, is_leaf=_is_factor)

    def init(params):
        mine = _of_these(factors, params)
        return KfacState(zero_count(), mine, inverted(mine), tree_map(zeros, params))

    def update(grads, state, params=None, *, factors=None, of_batch=None, **extra):
        check_state(state, KfacState)
        if factors is None and curvature is not None:
            factors = _now(curvature, of_batch)
        averages = state.factors
        if factors is not None:
            factors = _of_these(factors, grads)
            averages = tree_map(lambda a, f: decay * a + (1 - decay) * f, averages, factors)
        inverses = lax.cond(
            state.count % every == 0, inverted, lambda _: state.inverses, averages
        )
        grads = tree_map(wide, grads)
        natural = tree_map(lambda f, g: f.times(g), inverses, grads, is_leaf=_is_factor)
        if clip is not None:
            products = tree_map(lambda g, u: jnp.sum(g * u), grads, natural)
            length = jnp.sqrt(jnp.maximum(sum(tree_leaves(products)), 0))
            scale = jnp.minimum(1, clip / jnp.maximum(length, jnp.finfo(length.dtype).tiny))
            natural = tree_map(lambda u: u * scale.astype(u.dtype), natural)
        moved = tree_map(lambda m, u: momentum * m + u, state.momentum, natural)
        return moved, KfacState(increment(state.count), averages, inverses, moved)

    return part(init, update)


def kfac(
    learning_rate, factors, *, curvature: Callable | None = None, damping: float = 1e-3,
    decay: float = 0.95, every: int = 10, momentum: float = 0.9, clip: float | None = 0.1,
) -> Optimizer:
    """K-FAC (Martens and Grosse 2015, arXiv:1503.05671).

    ::

        F = decay F + (1 − decay) Fₜ,   u = (F + damping)⁻¹ g,   u ← u min(1, clip / √(uᵀg))
        m = momentum m + u,   p ← p − α m

    F is block-diagonal: of a weight A ⊗ G, whose damping is shared out between both factors by
    their traces (section 6.3). Elsewhere F is a diagonal, or a vector's whole block. The clipping
    is that of Ba et al. (2017), without the learning rate.

    Args:
      learning_rate: α, a number or a schedule.
      factors: the curvature to start from, as `fbprop.watch.curvature.ggn` or ``fisher`` gives it
        with ``kind="kronecker"`` (``samples=1`` costs one more backward sweep).
      curvature: ``(params, batch, key) -> factors``, called at every step of `fbprop.train.step`,
        ``epoch`` or ``fit``, with the loss's arguments; of the whole batch, also where the
        gradient's is worked through in pieces.
      damping, decay, momentum: see above.
      every: updates between two inversions.
      clip: largest length √(uᵀg) of a step before momentum; None: any.

    Returns:
      An optimiser whose ``update(grads, state, params, factors=...)`` takes the batch's factors;
      without them, and without ``curvature``, the average stays.

    Raises:
      ValueError: a value outside its range, or ``curvature`` in an ``update`` without a batch.
      TypeError: ``factors`` are not like the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> from fbprop.watch import curvature
      >>> def loss(outputs, y):
      ...     return jnp.mean((outputs - y) ** 2) / 2
      >>> factors = curvature.ggn(lambda w, x: x @ w, loss, "kronecker")
      >>> w, x, y = jnp.zeros((1, 1)), jnp.full((1, 1), 2.0), jnp.ones((1, 1))
      >>> optimizer = optim.kfac(1.0, factors(w, x, y), damping=0.0, clip=None)
      >>> updates, _ = optimizer.update(jnp.full((1, 1), -2.0), optimizer.init(w))
      >>> updates.tolist()
      [[0.5]]
    """
    return chain(
        scale_by_kfac(factors, curvature=curvature, damping=damping, decay=decay, every=every,
                      momentum=momentum, clip=clip),
        scale_by_learning_rate(learning_rate),
    )


def _now(curvature, of_batch):
    if of_batch is None:
        raise ValueError(
            "K-FAC's curvature is of a step's batch, got an update without one; expected one of "
            "fbprop.train.step, or update(grads, state, params, factors=curvature(params, ...))."
        )
    return of_batch(curvature)


def _is_factor(x):
    return hasattr(x, "inverse") and hasattr(x, "times")


def _of_these(factors, params):
    """The factors of these parameters: None, as these, where they are frozen or another group's."""
    try:
        mine = tree_map(lambda f, p: None if p is None else f, factors, params, is_leaf=_is_factor)
    except ValueError:
        mine = factors
    like = jax.tree.structure(tree_map(lambda _: 0, mine, is_leaf=_is_factor))
    found = jax.tree.leaves(mine, is_leaf=_is_factor)
    if like != jax.tree.structure(params) or not all(map(_is_factor, found)):
        raise TypeError(
            "K-FAC starts from a curvature like the parameters, got "
            f"{jax.tree.structure(mine, is_leaf=_is_factor)} expected factors in "
            f"{jax.tree.structure(params)}: fbprop.watch.curvature.ggn(network, loss, 'kronecker')."
        )
    return mine
