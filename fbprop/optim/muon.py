"""Muon: momentum of matrices, orthogonalised."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map

from fbprop.optim.adam import momentum_weights, scale_by_adam
from fbprop.optim.arguments import check_count, check_decay, check_least, numbers
from fbprop.optim.chain import chain
from fbprop.optim.decay import decay_parts
from fbprop.optim.norm import norm_of
from fbprop.optim.paths import grouped
from fbprop.optim.transform import (
    Optimizer,
    leafwise,
    scale_by_learning_rate,
    scaled,
    wide,
    zeros,
)

# Jordan 2024: chosen for the steepest slope at 0; singular values end between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def muon(learning_rate, momentum: float = 0.95, *, nesterov: bool = True, steps: int = 5,
         coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-8,
         bias_correction: bool = True, weight_decay: float = 0.0, mask=None, matrices=None,
         adam_learning_rate=None, adam_b1: float = 0.9, adam_b2: float = 0.999) -> Optimizer:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices, Adam else.

    For a weight of shape [in, out]::

        mₜ = μ mₜ₋₁ + (1 − μ) gₜ;   m̂ = μ mₜ + (1 − μ) gₜ, or mₜ without Nesterov
        O = Newton-Schulz(m̂ / |m̂|), approximately U Vᵀ of m̂ = U S Vᵀ
        p ← p − α (√max(1, out / in) O + λ p)

    Optax's ``contrib.muon`` weights the two terms of m̂ as NAdam does (``bias_correction=True``, the
    default); Jordan's code and PyTorch's ``Muon`` do not, iterate in bfloat16, and hold weights as
    [out, in]; PyTorch's λ is 0.1. As in Optax, the other parameters take Adam's step with
    Nesterov's look-ahead, without weight decay.

    Args:
      learning_rate: α, a number or a schedule.
      momentum: μ in [0, 1). nesterov: see above.
      steps, coefficients: Newton-Schulz iterations X ← aX + b(XXᵀ)X + c(XXᵀ)²X.
      eps: added to the norm before Newton-Schulz, and Adam's eps.
      bias_correction: see above.
      weight_decay: λ, decoupled. mask: which matrices decay, see `select`; None: all.
      matrices: which parameters take Muon's step, see `select`; None: those with two axes. Jordan
        leaves embeddings and the output layer to Adam. A leaf of more axes, a convolution's, is
        taken as a matrix of its last axis and the others.
      adam_learning_rate: for the other parameters; None: ``learning_rate``.
      adam_b1, adam_b2: for the other parameters.

    Raises:
      ValueError: a value outside its range, or a chosen leaf with fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.muon(0.1, steps=30, coefficients=(2.0, -1.5, 0.5))
      >>> params = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.ones(2)}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.allclose(updates["w"], -0.1 * jnp.eye(2), atol=1e-6))
      True
    """
    direction = scale_by_muon(momentum, nesterov, steps, coefficients, eps, bias_correction)
    of_matrices = chain(
        direction, *decay_parts(weight_decay, mask), scale_by_learning_rate(learning_rate)
    )
    others = chain(
        scale_by_adam(adam_b1, adam_b2, eps, nesterov=True),
        scale_by_learning_rate(
            learning_rate if adam_learning_rate is None else adam_learning_rate
        ),
    )
    chosen = _two_axes if matrices is None else matrices
    return grouped([(chosen, of_matrices), (lambda p: tree_map(lambda _: True, p), others)])


def _two_axes(params):
    return tree_map(lambda p: p.ndim == 2, params)


def scale_by_muon(momentum: float = 0.95, nesterov: bool = True, steps: int = 5,
                  coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-8,
                  bias_correction: bool = True) -> Optimizer:
    """Muon's direction, √max(1, out / in) O, for every leaf: see `muon`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> part = optim.scale_by_muon()
      >>> part.update(jnp.zeros((2, 3)), part.init(jnp.zeros((2, 3))))[0].tolist()
      [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    check_decay("momentum", momentum)
    _check_iteration(steps, coefficients, eps)

    def per_step(count):
        # Without Nesterov the correction is one factor, which Newton-Schulz divides out again.
        if nesterov and bias_correction:
            return momentum_weights(momentum, count, True)
        return (momentum, 1 - momentum) if nesterov else (1.0, 0.0)

    def rule(g, slots, weights, p):
        if g.ndim < 2:
            raise ValueError(
                f"Muon's step is for matrices, got a parameter of shape {g.shape} expected at "
                "least two axes: leave it to Adam by the argument matrices."
            )
        m = momentum * slots["momentum"] + (1 - momentum) * g
        ahead = weights[0] * m + weights[1] * g if nesterov else m
        if g.size == 0:
            return ahead, {"momentum": m}
        ahead = ahead.reshape(-1, g.shape[-1])
        widening = max(1.0, ahead.shape[1] / ahead.shape[0]) ** 0.5
        out = widening * orthogonalize(ahead, steps, coefficients, eps)
        return out.reshape(g.shape), {"momentum": m}

    return leafwise(rule, {"momentum": zeros}, per_step=per_step)


def orthogonalize(x, steps: int = 5, coefficients=COEFFICIENTS, eps: float = 1e-8):
    """U Vᴴ of the matrix x = U S Vᴴ, roughly, by Newton-Schulz iterations of matrix products.

    A 16-bit matrix is iterated in float32.

    Raises:
      ValueError: x has not two axes, or a value outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> y = optim.orthogonalize(jnp.array([[0.0, 5.0], [3.0, 0.0]]))
      >>> bool(jnp.all(jnp.abs(y @ y.T - jnp.eye(2)) < 0.5))
      True
    """
    _check_iteration(steps, coefficients, eps)
    x = wide(numbers(x, "a matrix"))
    if x.ndim != 2:
        raise ValueError(
            f"A matrix has two axes, got x of shape {x.shape} expected [rows, columns]: reshape "
            "it, or map over its other axes with jax.vmap."
        )
    if tall := x.shape[0] > x.shape[1]:
        x = x.T  # The Gram matrix is then the smaller of the two.
    norm = norm_of(x)
    length = norm.root + eps / norm.scale
    x = scaled(scaled(x, 1 / norm.scale), 1 / jnp.where(length == 0, 1, length))
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.conj().T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _check_iteration(steps, coefficients, eps):
    check_count("steps", steps)
    check_least(eps=eps)
    if np.shape(coefficients) != (3,):
        raise ValueError(
            f"Newton-Schulz's polynomial is odd and of degree 5, got coefficients={coefficients} "
            "expected three numbers."
        )
