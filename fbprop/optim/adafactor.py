"""Adafactor: second moments of matrices kept as a row and a column."""

from __future__ import annotations

import math

import jax.numpy as jnp

from fbprop.optim.arguments import check_count, check_decay, check_least, passes
from fbprop.optim.chain import chain
from fbprop.optim.clip import clip_by_leaf_rms
from fbprop.optim.decay import decay_parts
from fbprop.optim.norm import rms
from fbprop.optim.transform import (
    Optimizer,
    abs_squared,
    leafwise,
    real_zeros,
    scale_by_learning_rate,
    zeros,
)


def adafactor(learning_rate=None, *, min_dim_size_to_factor: int = 128, decay_rate: float = 0.8,
              multiply_by_parameter_scale: bool = True, clipping_threshold: float | None = 1.0,
              momentum: float = 0.0, eps: float = 1e-30, min_scale: float = 1e-3,
              weight_decay: float = 0.0, mask=None) -> Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5).

    For a matrix, with β = 1 − t^(−decay_rate) and d the clipping threshold::

        R = β R + (1 − β) row means of g² + eps,   C likewise over columns
        u = g / √(R C / mean R);   u ← u / max(1, rms(u) / d);   p ← p − α max(min_scale, rms(p)) u

    n + m numbers instead of n m. Other leaves, and matrices whose two largest axes are not both at
    least ``min_dim_size_to_factor``, keep all of them.

    Optax's, with these differences: without a learning rate, α is the paper's min(1e-2, 1/√t)
    (Optax: 1); weight decay is multiplied by α (Optax: not); momentum comes before α (Optax:
    after). PyTorch's has α = min(lr, 1/√t), factors every matrix, and the smaller
    ``min_dim_size_to_factor=1, eps`` = (float epsilon)².

    Args:
      learning_rate: α, a number or a schedule; None: min(1e-2, 1/√t).
      min_dim_size_to_factor, decay_rate, clipping_threshold (None: no clipping), eps, min_scale:
        see above.
      multiply_by_parameter_scale: False leaves max(min_scale, rms(p)) out.
      momentum: in [0, 1): u is averaged, m = μ m + (1 − μ) u; with 0 nothing is stored.
      weight_decay: decoupled. mask: which parameters decay, see `select`; None: all.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer, params = optim.adafactor(0.1), jnp.ones((256, 512))
      >>> state = optimizer.init(params)
      >>> sum(x.size for x in jax.tree.leaves(state)) < 1000
      True
    """
    parts = [scale_by_factored_rms(min_dim_size_to_factor, decay_rate, eps)]
    if clipping_threshold is not None:
        parts.append(clip_by_leaf_rms(clipping_threshold))
    if multiply_by_parameter_scale:
        parts.append(_scale_by_parameter(min_scale))
    if momentum:
        parts.append(_average(momentum))
    rate = _relative_step if learning_rate is None else learning_rate
    return chain(*parts, *decay_parts(weight_decay, mask), scale_by_learning_rate(rate))


def scale_by_factored_rms(min_dim_size_to_factor: int = 128, decay_rate: float = 0.8,
                          eps: float = 1e-30) -> Optimizer:
    """The division in `adafactor`: g / √v, with v of a matrix from its row and column means.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> part = optim.scale_by_factored_rms(min_dim_size_to_factor=2)
      >>> g = jnp.array([[1.0, 2.0], [2.0, 4.0]])
      >>> part.update(g, part.init(g))[0].round(5).tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    check_least(eps=eps)
    check_count("min_dim_size_to_factor", min_dim_size_to_factor)
    if not passes("decay_rate", decay_rate, lambda v: 0 < v < math.inf):
        raise ValueError(f"β = 1 − t^(−decay_rate) rises to 1, got {decay_rate=} expected it > 0.")

    def per_step(count):
        # Both, because 1 − β from a rounded β would be off by 1% after a million steps.
        share = jnp.exp(-decay_rate * jnp.log(count.astype(jnp.result_type(float))))
        return 1 - share, share

    def rule(g, slots, scalars, p):
        beta, share = scalars
        squared = abs_squared(g) + eps
        axes = _factored_axes(g.shape, min_dim_size_to_factor)
        if not axes:
            v = beta * slots["full"] + share * squared
            return g / jnp.sqrt(v), {"row": None, "column": None, "full": v}
        row, column = (
            beta * slots[name] + share * jnp.mean(squared, axis)
            for name, axis in zip(("row", "column"), axes)
        )
        # Two divisions, because R C of gradients below 1e-10 underflows in float32.
        of_row = jnp.sqrt(jnp.expand_dims(row / jnp.mean(row), axes[0]))
        return g / of_row / jnp.sqrt(jnp.expand_dims(column, axes[1])), {
            "row": row, "column": column, "full": None,
        }

    def without(which):
        def zero(p):
            axes = _factored_axes(p.shape, min_dim_size_to_factor)
            return jnp.mean(real_zeros(p), axes[which]) if axes else None
        return zero

    def full(p):
        return None if _factored_axes(p.shape, min_dim_size_to_factor) else real_zeros(p)

    slots = {"row": without(0), "column": without(1), "full": full}
    return leafwise(rule, slots, per_step=per_step)


def _factored_axes(shape, least):
    """The two largest axes, the largest first, or () if the leaf is kept in full."""
    order = sorted(range(len(shape)), key=lambda i: shape[i])[-2:]
    return tuple(reversed(order)) if len(order) == 2 and shape[order[0]] >= least else ()


def _scale_by_parameter(least):
    """u ← u max(least, rms(p))."""
    check_least(min_scale=least)

    def rule(u, slots, scalars, p):
        return u * jnp.maximum(rms(p), least), {}

    return leafwise(rule, params_needed="adafactor with multiply_by_parameter_scale")


def _average(momentum):
    check_decay("momentum", momentum)

    def rule(u, slots, scalars, p):
        m = momentum * slots["momentum"] + (1 - momentum) * u
        return m, {"momentum": m}

    return leafwise(rule, {"momentum": zeros})


def _relative_step(count):
    return jnp.minimum(1e-2, 1 / jnp.sqrt(1.0 + count.astype(jnp.result_type(float))))
