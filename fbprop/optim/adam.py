"""Adam and its relatives: AdamW, AMSGrad, NAdam."""

from __future__ import annotations

import math

import jax.numpy as jnp

from fbprop.core.factored import Rows
from fbprop.optim.arguments import check_decay, check_least
from fbprop.optim.chain import chain
from fbprop.optim.decay import decay_parts
from fbprop.optim.transform import (
    Optimizer,
    abs_squared,
    increment,
    leafwise,
    real_zeros,
    scale_by_learning_rate,
    zeros,
)


def adam(learning_rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *,
         eps_root: float = 0.0, weight_decay: float = 0.0, mask=None) -> Optimizer:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1).

    With gₜ the gradient plus λ p::

        mₜ = b1 mₜ₋₁ + (1 − b1) gₜ          m̂ = mₜ / (1 − b1ᵗ)
        vₜ = b2 vₜ₋₁ + (1 − b2) gₜ²         v̂ = vₜ / (1 − b2ᵗ)
        p ← p − α m̂ / (√(v̂ + eps_root) + eps)

    Optax and PyTorch compute the same. Optax's ``adam`` has no ``weight_decay``; PyTorch's is this
    L2 penalty. Optax keeps moments in the parameters' dtype, here they are at least float32. In
    float32, 1 − b2ᵗ is computed without cancellation (expm1): Optax's first step is off by 7e-6.

    Args:
      learning_rate: α, a number or a schedule.
      b1, b2: decay of the running averages, in [0, 1).
      eps: added to the root; eps_root: inside it, for differentiating through the update.
      weight_decay: λ, an L2 penalty that passes through the moments; decoupled: see `adamw`.
      mask: which parameters decay, see `select`; None: all.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.adam(0.1)
      >>> params = jnp.array([1.0, -1.0])
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> [round(float(u), 6) for u in updates]
      [-0.1, 0.1]
    """
    moments = scale_by_adam(b1, b2, eps, eps_root=eps_root)
    return chain(*decay_parts(weight_decay, mask), moments, scale_by_learning_rate(learning_rate))


def adamw(learning_rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *,
          eps_root: float = 0.0, weight_decay: float = 1e-4, mask=None) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101).

    As `adam`, and p ← p − α λ p in the same step. As in Optax and PyTorch, λ is multiplied by the
    whole learning rate (in the paper by the schedule's factor only). The default λ is Optax's;
    PyTorch's is 1e-2.

    Args:
      learning_rate, b1, b2, eps, eps_root: see `adam`.
      weight_decay: λ.
      mask: which parameters decay, see `select`; None: all. Biases and scales usually do not.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.adamw(0.1, weight_decay=0.5, mask="*w")
      >>> params = {"w": jnp.array(1.0), "b": jnp.array(1.0)}
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> {k: round(float(u), 6) for k, u in updates.items()}
      {'b': -0.1, 'w': -0.15}
    """
    moments = scale_by_adam(b1, b2, eps, eps_root=eps_root)
    return chain(moments, *decay_parts(weight_decay, mask), scale_by_learning_rate(learning_rate))


def amsgrad(learning_rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *,
            eps_root: float = 0.0, correct_before_max: bool = True, weight_decay: float = 0.0,
            mask=None) -> Optimizer:
    """AMSGrad (Reddi, Kale and Kumar 2018, arXiv:1904.09237): Adam with a v that never falls.

    As `adam`, with v̂ replaced by the largest so far. Optax takes the largest of the
    bias-corrected v̂ (the default here); PyTorch, ``Adam(amsgrad=True)``, the largest vₜ, corrected
    afterwards (``correct_before_max=False``). The paper corrects neither moment.

    Args:
      learning_rate, b1, b2, eps, eps_root, weight_decay, mask: see `adam`.
      correct_before_max: which of the two.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.amsgrad(0.1)
      >>> updates, _ = optimizer.update(jnp.array(2.0), optimizer.init(jnp.array(1.0)))
      >>> round(float(updates), 6)
      -0.1
    """
    _check(b1, b2, eps, eps_root)

    def per_step(count):
        c1, c2 = bias_correction(b1, count), bias_correction(b2, count)
        return (c1, c2, 1.0) if correct_before_max else (c1, 1.0, c2)

    def rule(g, slots, corrections, p):
        c1, before, after = corrections
        m, v = moments(g, slots, b1, b2)
        largest = jnp.maximum(slots["nu_max"], v / before)
        direction = (m / c1) / (jnp.sqrt(largest / after + eps_root) + eps)
        return direction, {"mu": m, "nu": v, "nu_max": largest}

    slots = {"mu": zeros, "nu": real_zeros, "nu_max": real_zeros}
    return chain(
        *decay_parts(weight_decay, mask), leafwise(rule, slots, per_step=per_step, takes_rows=True),
        scale_by_learning_rate(learning_rate),
    )


def nadam(learning_rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *,
          eps_root: float = 0.0, momentum_decay: float | None = None, weight_decay: float = 0.0,
          mask=None) -> Optimizer:
    """NAdam (Dozat 2016, "Incorporating Nesterov momentum into Adam").

    As `adam`, with m̂ = μₜ₊₁ mₜ / (1 − Πᵗ⁺¹ μ) + (1 − μₜ) gₜ / (1 − Πᵗ μ), Π the product of the
    momenta so far. Optax keeps μ = b1 (the default here). PyTorch warms it up:
    μₜ = b1 (1 − 0.96^(t ψ) / 2) with ψ = ``momentum_decay`` = 4e-3, which m's own average does not
    use; nor does it here.

    Args:
      learning_rate, b1, b2, eps, eps_root, weight_decay, mask: see `adam`.
      momentum_decay: ψ, or None for a constant μ = b1.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.nadam(0.1)
      >>> updates, _ = optimizer.update(jnp.array(2.0), optimizer.init(jnp.array(1.0)))
      >>> round(float(updates), 6)
      -0.147368
    """
    if momentum_decay is None:
        ahead = scale_by_adam(b1, b2, eps, eps_root=eps_root, nesterov=True)
    else:
        ahead = _warmed_nadam(b1, b2, eps, eps_root, momentum_decay)
    return chain(*decay_parts(weight_decay, mask), ahead, scale_by_learning_rate(learning_rate))


def _warmed_nadam(b1, b2, eps, eps_root, momentum_decay):
    """NAdam's direction with a momentum that rises from b1/2 to b1."""
    check_least(momentum_decay=momentum_decay)
    _check(b1, b2, eps, eps_root)

    def momentum(count):
        t = count.astype(jnp.result_type(float))
        return b1 * (1 - 0.5 * jnp.exp(t * (momentum_decay * math.log(0.96))))

    def per_step(count):
        return momentum(count), momentum(increment(count)), bias_correction(b2, count)

    def rule(g, slots, scalars, p):
        now, after, c = scalars
        m, v = moments(g, slots, b1, b2)
        product = slots["momentum_product"] * now
        ahead = after / (1 - product * after) * m + (1 - now) / (1 - product) * g
        direction = ahead / (jnp.sqrt(v / c + eps_root) + eps)
        return direction, {"mu": m, "nu": v, "momentum_product": product}

    def one(p):
        return jnp.ones((), real_zeros(p).dtype)

    slots = {"mu": zeros, "nu": real_zeros, "momentum_product": one}
    return leafwise(rule, slots, per_step=per_step)


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, eps_root: float = 0.0,
                  nesterov: bool = False) -> Optimizer:
    """Adam's direction, m̂ / (√(v̂ + eps_root) + eps), for chains of one's own.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> direction = optim.scale_by_adam()
      >>> u, _ = direction.update(jnp.array(-3.0), direction.init(jnp.array(0.0)))
      >>> round(float(u), 6)
      -1.0
    """
    _check(b1, b2, eps, eps_root)

    def per_step(count):
        of_m, of_g = momentum_weights(b1, count, nesterov)
        # Corrections are scalars, so they are multiplied out once, not for every element:
        # m̂ / (√(v/c + r) + e) = √c m̂ / (√(v + r c) + e √c).
        c = bias_correction(b2, count)
        return of_m * jnp.sqrt(c), of_g * jnp.sqrt(c), eps_root * c, eps * jnp.sqrt(c)

    def rule(g, slots, scalars, p):
        of_m, of_g, root, outside = scalars
        m, v = moments(g, slots, b1, b2)
        ahead = of_m * m + of_g * g if nesterov else of_m * m
        return ahead / (jnp.sqrt(v + root if eps_root else v) + outside), {"mu": m, "nu": v}

    slots = {"mu": zeros, "nu": real_zeros}
    return leafwise(rule, slots, per_step=per_step, takes_rows=not nesterov)


def moments(g, slots, b1, b2):
    """The running averages of g and g². Of rows only they are added, without a table of zeros."""
    m, v = b1 * slots["mu"], b2 * slots["nu"]
    if isinstance(g, Rows):
        now = g.map(lambda x: (1 - b1) * x), g.map(lambda x: (1 - b2) * abs_squared(x))
        return now[0].add_to(m), now[1].add_to(v)
    return m + (1 - b1) * g, v + (1 - b2) * abs_squared(g)


def bias_correction(decay: float, count):
    """1 − decayᵗ, what a running average from 0 has seen of the weights after t steps.

    By expm1, with the logarithm in Python's float64: in float32, 1 − 0.999 alone is off by 1.3e-5.
    """
    if decay == 0:
        return jnp.ones((), jnp.result_type(float))
    return -jnp.expm1(count.astype(jnp.result_type(float)) * math.log(decay))


def momentum_weights(b1, count, nesterov):
    """The weights of mₜ and gₜ in m̂."""
    if nesterov:
        return b1 / bias_correction(b1, increment(count)), (1 - b1) / bias_correction(b1, count)
    return 1 / bias_correction(b1, count), 0.0


def _check(b1, b2, eps, eps_root):
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_least(eps=eps, eps_root=eps_root)
