"""Clipping of gradients: by the norm of all, of each leaf, or by value."""

from __future__ import annotations

import math

import jax.numpy as jnp

from fbprop.optim.arguments import passes
from fbprop.optim.norm import shortened
from fbprop.optim.transform import Optimizer, leafless, stateless


def clip_by_global_norm(max_norm: float) -> Optimizer:
    """g ← g · min(1, c / |g|), |g| over all leaves together (Pascanu et al. 2013, arXiv:1211.5063).

    As Optax's, but right up to the largest float32, whose square is infinite. PyTorch's
    ``clip_grad_norm_`` divides by |g| + 1e-6. Of gradients that are not finite, infinite elements
    become nan and the finite ones 0; with a nan all become nan, as in both: the parameters show
    it, `fbprop.train.fit` stops there, and a loss scale skips the step. The derivative of the
    clipping itself is that of the branch taken, and at 0 the identity.

    Raises:
      ValueError: c <= 0.   TypeError: c is no number.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> clip = optim.clip_by_global_norm(1.0)
      >>> [round(float(g), 6) for g in clip.update(jnp.array([3.0, 4.0]), ())[0]]
      [0.6, 0.8]
    """
    _check_limit("max_norm", max_norm)

    return stateless(lambda grads: shortened(grads, max_norm))


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
    return leafless(lambda g: shortened(g, max_norm))


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
    return leafless(lambda g: shortened(g, max_rms * math.sqrt(max(g.size, 1))))


def clip_by_value(limit: float) -> Optimizer:
    """g ← min(max(g, −c), c), element by element.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optim.clip_by_value(1.0).update(jnp.array([-3.0, 0.5]), ())[0].tolist()
      [-1.0, 0.5]
    """
    _check_limit("limit", limit)

    def clip(g):
        if jnp.iscomplexobj(g):
            raise TypeError(
                f"clip_by_value orders numbers, got a gradient of {g.dtype.name} expected a real "
                "one: clip complex ones by their modulus, with clip_by_leaf_norm."
            )
        return jnp.clip(g, -limit, limit)

    return leafless(clip)


def _check_limit(name, limit):
    if not passes(name, limit, lambda v: v > 0):
        raise ValueError(f"Clipping leaves something over, got {name}={limit} expected it > 0.")
