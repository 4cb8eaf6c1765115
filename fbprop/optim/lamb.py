"""LAMB: Adam with each layer's step in proportion to its weights, for large batches."""

from __future__ import annotations

import jax.numpy as jnp

from fbprop.optim.adam import scale_by_adam
from fbprop.optim.chain import chain
from fbprop.optim.decay import decay_parts
from fbprop.optim.norm import norm_of
from fbprop.optim.transform import Optimizer, leafwise, scale_by_learning_rate


def lamb(learning_rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, *,
         eps_root: float = 0.0, weight_decay: float = 0.0, mask=None) -> Optimizer:
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2).

    For every leaf, with r Adam's direction plus λ p: p ← p − α (|p| / |r|) r, the ratio being 1
    where either norm is 0. Same as Optax's; the paper's φ is the identity. PyTorch has none.

    Args:
      learning_rate: α, a number or a schedule.
      b1, b2, eps, eps_root: see `adam`; note the larger eps.
      weight_decay: λ. mask: which parameters decay, see `select`; None: all.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer, params = optim.lamb(0.1), jnp.array([3.0, 4.0])
      >>> updates, _ = optimizer.update(jnp.array([1.0, 1.0]), optimizer.init(params), params)
      >>> [round(float(u), 5) for u in updates]
      [-0.35355, -0.35355]
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root=eps_root), *decay_parts(weight_decay, mask),
        scale_by_trust_ratio(), scale_by_learning_rate(learning_rate),
    )


def scale_by_trust_ratio() -> Optimizer:
    """u ← u |p| / |u| for every leaf, the ratio being 1 where either norm is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> part, params = optim.scale_by_trust_ratio(), jnp.array([6.0, 8.0])
      >>> part.update(jnp.array([0.0, 2.0]), part.init(params), params)[0].tolist()
      [0.0, 10.0]
    """
    def rule(u, slots, scalars, p):
        size, length = norm_of(p), norm_of(u)
        idle = (size.root == 0) | (length.root == 0)
        ratio = jnp.where(idle, 1, size.value / jnp.where(idle, 1, length.root))
        # The choice stands between the factors, or XLA would multiply these first, to 0.
        return jnp.where(idle, u, u * (1 / length.scale)) * ratio, {}

    return leafwise(rule, params_needed="scale_by_trust_ratio")
