"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

import jax.numpy as jnp

from fbprop.optim.arguments import check_decay
from fbprop.optim.chain import chain
from fbprop.optim.decay import decay_parts
from fbprop.optim.transform import (
    Optimizer,
    leafwise,
    scale_by_learning_rate,
    zeros,
)


def lion(learning_rate, b1: float = 0.9, b2: float = 0.99, *, weight_decay: float = 1e-3,
         mask=None) -> Optimizer:
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

    ::

        u = sign(b1 mₜ₋₁ + (1 − b1) gₜ),   mₜ = b2 mₜ₋₁ + (1 − b2) gₜ
        p ← p − α (u + λ p)

    One moment instead of Adam's two; every element moves by α, so α is 3 to 10 times smaller than
    Adam's and λ as much larger. Same as Optax's, its default λ too; PyTorch has none.

    Args:
      learning_rate: α, a number or a schedule.
      b1, b2: in [0, 1).
      weight_decay: λ, decoupled. mask: which parameters decay, see `select`; None: all.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.lion(0.1, weight_decay=0.0)
      >>> optimizer.update(jnp.array([3.0, -7.0]), optimizer.init(jnp.zeros(2)))[0].tolist()
      [-0.10000000149011612, 0.10000000149011612]
    """
    check_decay("b1", b1)
    check_decay("b2", b2)

    def rule(g, slots, scalars, p):
        m = slots["mu"]
        return jnp.sign(b1 * m + (1 - b1) * g), {"mu": b2 * m + (1 - b2) * g}

    return chain(
        leafwise(rule, {"mu": zeros}), *decay_parts(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
