"""Stochastic gradient descent with momentum."""

from __future__ import annotations

import jax.numpy as jnp

from fbprop.optim.arguments import passes
from fbprop.optim.chain import chain
from fbprop.optim.decay import decay_parts
from fbprop.optim.transform import Optimizer, leafwise, scale_by_learning_rate, zeros


def sgd(learning_rate, momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0,
        weight_decay: float = 0.0, mask=None) -> Optimizer:
    """Stochastic gradient descent.

    With gₜ the gradient plus λ p, m₀ absent, μ momentum, d dampening::

        m₁ = g₁,   mₜ = μ mₜ₋₁ + (1 − d) gₜ
        p ← p − α mₜ            or, Nesterov,   p ← p − α (gₜ + μ mₜ)

    Robbins and Monro 1951; Polyak 1964 (momentum); Sutskever et al. 2013 (this form of Nesterov's
    method). Same as PyTorch's ``SGD``, first step undampened included. Optax's ``sgd`` has no
    dampening and no weight decay (it chains ``add_decayed_weights``); otherwise the same.

    Args:
      learning_rate: α, a number or a schedule.
      momentum: μ in [0, 1); with 0 nothing is stored.
      nesterov: needs momentum > 0 and dampening = 0.
      dampening: d in [0, 1].
      weight_decay: λ, an L2 penalty: it passes through the momentum.
      mask: which parameters decay, see `select`; None: all.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.sgd(0.5, momentum=0.9)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> optim.apply_updates(params, updates).tolist()
      [0.5, 1.0]
    """
    parts = decay_parts(weight_decay, mask)
    if momentum or nesterov or dampening:
        parts.append(accumulate(momentum, nesterov, dampening))
    return chain(*parts, scale_by_learning_rate(learning_rate))


def accumulate(momentum: float, nesterov: bool = False, dampening: float = 0.0) -> Optimizer:
    """The momentum part of `sgd`: u ← mₜ, or gₜ + μ mₜ."""
    averages = passes("momentum", momentum, lambda v: 0 <= v < 1)
    if not (averages and passes("dampening", dampening, lambda v: 0 <= v <= 1)):
        raise ValueError(
            f"Momentum averages past gradients, got momentum={momentum}, dampening={dampening} "
            "expected 0 <= momentum < 1 and 0 <= dampening <= 1."
        )
    if nesterov and (not momentum or dampening):
        raise ValueError(
            f"Nesterov's step looks ahead along the momentum, got momentum={momentum}, "
            f"dampening={dampening} expected momentum > 0 and dampening = 0."
        )

    def per_step(count):
        return jnp.where(count == 1, 1.0, 1.0 - dampening)

    def rule(g, slots, share, p):
        m = momentum * slots["momentum"] + (share * g if dampening else g)
        return (g + momentum * m if nesterov else m), {"momentum": m}

    return leafwise(rule, {"momentum": zeros}, per_step=per_step)
