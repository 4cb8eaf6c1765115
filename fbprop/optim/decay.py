"""Weight decay: one part of a chain, two methods by where it stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map

from fbprop.optim.arguments import passes
from fbprop.optim.paths import select
from fbprop.optim.transform import Optimizer, check_params, part, scaled, wide


def add_weight_decay(rate: float, mask=None) -> Optimizer:
    """u ← u + λ p for the chosen parameters.

    Before the moments this is L2 regularisation, the gradient of λ|p|²/2 (PyTorch's
    ``weight_decay`` in ``SGD`` and ``Adam``). After them, and before the learning rate, it is
    decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), as `adamw` has it.

    Args:
      rate: λ >= 0.
      mask: which parameters decay: pattern(s) on paths, a pytree of bools (or a prefix of one), or
        a function from params to one; None: all. See `select`.

    Raises:
      ValueError: λ < 0; or ``update`` is called without params.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> decay = optim.add_weight_decay(0.5, mask="w")
      >>> params = {"w": jnp.array(2.0), "b": jnp.array(2.0)}
      >>> updates, _ = decay.update(params, decay.init(params), params)
      >>> float(updates["w"]), float(updates["b"])
      (3.0, 2.0)
    """
    check_weight_decay(rate)

    def update(grads, state, params=None, **extra):
        check_params(params, "add_weight_decay")
        chosen = select(True if mask is None else mask, grads)
        decayed = tree_map(
            lambda m, g, p: _sum(wide(g), scaled(p, jnp.asarray(rate))) if m else g,
            chosen, grads, params,
        )
        return decayed, state

    return part(lambda params: (), update)


def _sum(g, decay):
    """In the wider type of the two: float32 gradients of float64 or complex parameters, say."""
    dtype = np.promote_types(g.dtype, decay.dtype)
    return g.astype(dtype) + decay.astype(dtype)


def check_weight_decay(rate):
    if not passes("weight_decay", rate, lambda v: 0 <= v < float("inf")):
        raise ValueError(
            f"Weight decay pulls towards zero, got weight_decay={rate} expected a number >= 0."
        )


def decay_parts(rate, mask) -> list[Optimizer]:
    """`add_weight_decay` as zero or one part of a chain: with λ = 0 nothing reads the params."""
    check_weight_decay(rate)
    none = not isinstance(rate, jax.core.Tracer) and rate == 0
    return [] if none else [add_weight_decay(rate, mask)]
