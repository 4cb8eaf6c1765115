"""Steps divided by the root of squared gradients: RMSProp's average, Adagrad's sum."""

from __future__ import annotations

import jax.numpy as jnp

from fbprop.optim.arguments import check_decay, check_least
from fbprop.optim.chain import chain
from fbprop.optim.decay import decay_parts
from fbprop.optim.sgd import accumulate
from fbprop.optim.transform import (
    Optimizer,
    abs_squared,
    leafwise,
    real_zeros,
    scale_by_learning_rate,
    zeros,
)


def rmsprop(learning_rate, decay: float = 0.9, eps: float = 1e-8, *, eps_in_sqrt: bool = True,
            centered: bool = False, momentum: float = 0.0, nesterov: bool = False,
            weight_decay: float = 0.0, mask=None) -> Optimizer:
    """RMSProp (Tieleman and Hinton 2012, lecture 6.5; centred: Graves 2013, arXiv:1308.0850).

    With gₜ the gradient plus λ p, ρ the decay::

        vₜ = ρ vₜ₋₁ + (1 − ρ) gₜ²           centred:  aₜ = ρ aₜ₋₁ + (1 − ρ) gₜ,  vₜ − aₜ² for vₜ
        u = gₜ / √(vₜ + eps)                eps_in_sqrt=False:  gₜ / (√vₜ + eps)
        p ← p − α mₜ,  mₜ = μ mₜ₋₁ + u

    The defaults are Optax's. PyTorch's are ``decay=0.99, eps_in_sqrt=False``. Optax puts the
    momentum after the learning rate, which differs while a schedule moves; PyTorch as here.

    Args:
      learning_rate: α, a number or a schedule.
      decay: ρ in [0, 1).
      eps, eps_in_sqrt, centered: see above.
      momentum: μ in [0, 1). nesterov: use u + μ mₜ for mₜ.
      weight_decay: λ, an L2 penalty. mask: which parameters decay, see `select`; None: all.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.rmsprop(0.1, decay=0.75)
      >>> updates, _ = optimizer.update(jnp.array(3.0), optimizer.init(jnp.array(0.0)))
      >>> round(float(updates), 6)
      -0.2
    """
    check_decay("decay", decay)
    check_least(eps=eps)

    def rule(g, slots, scalars, p):
        new = {"nu": decay * slots["nu"] + (1 - decay) * abs_squared(g)}
        v = new["nu"]
        if centered:
            new["mean"] = decay * slots["mean"] + (1 - decay) * g
            # Rounding may put a² above v where the gradient hardly varies.
            v = jnp.maximum(v - abs_squared(new["mean"]), 0)
        return _divided(g, v, eps, eps_in_sqrt), new

    slots = {"nu": real_zeros} | ({"mean": zeros} if centered else {})
    parts = [*decay_parts(weight_decay, mask), leafwise(rule, slots)]
    if momentum or nesterov:
        parts.append(accumulate(momentum, nesterov))
    return chain(*parts, scale_by_learning_rate(learning_rate))


def adagrad(learning_rate, initial_accumulator_value: float = 0.1, eps: float = 1e-7, *,
            eps_in_sqrt: bool = True, weight_decay: float = 0.0, mask=None) -> Optimizer:
    """Adagrad (Duchi, Hazan and Singer 2011, JMLR 12).

    With gₜ the gradient plus λ p: sₜ = sₜ₋₁ + gₜ², p ← p − α gₜ / √(sₜ + eps).

    The defaults are Optax's. PyTorch's are ``initial_accumulator_value=0, eps=1e-10,
    eps_in_sqrt=False``: α gₜ / (√sₜ + eps); its ``lr_decay`` is the schedule
    α / (1 + t · lr_decay).

    Args:
      learning_rate: α, a number or a schedule.
      initial_accumulator_value: s₀ >= 0.
      eps, eps_in_sqrt: see above.
      weight_decay: λ, an L2 penalty. mask: which parameters decay, see `select`; None: all.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.adagrad(0.1, initial_accumulator_value=0.0)
      >>> updates, _ = optimizer.update(jnp.array(3.0), optimizer.init(jnp.array(0.0)))
      >>> round(float(updates), 6)
      -0.1
    """
    check_least(initial_accumulator_value=initial_accumulator_value, eps=eps)

    def rule(g, slots, scalars, p):
        s = slots["sum"] + abs_squared(g)
        return _divided(g, s, eps, eps_in_sqrt), {"sum": s}

    def first(p):
        return real_zeros(p) + initial_accumulator_value

    return chain(
        *decay_parts(weight_decay, mask), leafwise(rule, {"sum": first}),
        scale_by_learning_rate(learning_rate),
    )


def _divided(g, v, eps, eps_in_sqrt):
    return g / (jnp.sqrt(v + eps) if eps_in_sqrt else jnp.sqrt(v) + eps)
