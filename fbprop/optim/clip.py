"""Clipping of gradients: by the norm of all, of each leaf, or by value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.optim.transform import Optimizer, abs_squared, leafless, scaled, wide


def global_norm(tree) -> jax.Array:
    """√ Σ |x|² over every element of every leaf: a scalar, float32 at least.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> float(optim.global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
      5.0
    """
    squares = [jnp.sum(abs_squared(wide(x))) for x in jax.tree.leaves(tree)]
    widest = max((s.dtype for s in squares), key=lambda d: d.itemsize, default=jnp.float32)
    return jnp.sqrt(sum((s.astype(widest) for s in squares), jnp.zeros((), widest)))


def clip_by_global_norm(max_norm: float) -> Optimizer:
    """g ← g · min(1, c / |g|), |g| over all leaves together (Pascanu et al. 2013, arXiv:1211.5063).

    As Optax's. PyTorch's ``clip_grad_norm_`` divides by |g| + 1e-6.

    Raises:
      ValueError: c <= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> clip = optim.clip_by_global_norm(1.0)
      >>> [round(float(g), 6) for g in clip.update(jnp.array([3.0, 4.0]), ())[0]]
      [0.6, 0.8]
    """
    _check_limit("max_norm", max_norm)

    def update(grads, state, params=None, **extra):
        factor = _shrink(global_norm(grads), max_norm)
        return tree_map(lambda g: scaled(g, factor), grads), state

    return Optimizer(lambda params: (), update)


def clip_by_leaf_norm(max_norm: float) -> Optimizer:
    """As `clip_by_global_norm`, for each leaf by its own norm.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> clip = optim.clip_by_leaf_norm(1.0)
      >>> [g.tolist() for g in clip.update([jnp.array([0.0, 4.0]), jnp.array([0.5])], ())[0]]
      [[0.0, 1.0], [0.5]]
    """
    _check_limit("max_norm", max_norm)
    return leafless(lambda g: scaled(g, _shrink(global_norm(g), max_norm)))


def clip_by_leaf_rms(max_rms: float) -> Optimizer:
    """g ← g / max(1, rms(g) / c), each leaf by the root mean square of its own elements.

    Optax's ``clip_by_block_rms``; Adafactor's update clipping.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optim.clip_by_leaf_rms(1.0).update(jnp.array([2.0, -2.0]), ())[0].tolist()
      [1.0, -1.0]
    """
    _check_limit("max_rms", max_rms)
    return leafless(
        lambda g: scaled(g, 1 / jnp.maximum(1, jnp.sqrt(jnp.mean(abs_squared(g))) / max_rms))
    )


def clip_by_value(limit: float) -> Optimizer:
    """g ← min(max(g, −c), c), element by element.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optim.clip_by_value(1.0).update(jnp.array([-3.0, 0.5]), ())[0].tolist()
      [-1.0, 0.5]
    """
    _check_limit("limit", limit)
    return leafless(lambda g: jnp.clip(g, -limit, limit))


def _shrink(norm, limit):
    """min(1, limit / norm), with 1 for norm 0."""
    return jnp.where(norm > limit, limit / jnp.where(norm > limit, norm, 1), 1).astype(norm.dtype)


def _check_limit(name, limit):
    if not limit > 0:
        raise ValueError(f"Clipping leaves something over, got {name}={limit} expected it > 0.")
