"""Adam for the rows: fbprop's own, and what it is compared with.

That is Optax's where installed, else the same formula in plain JAX.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fbprop

try:
    import optax
except ImportError:
    optax = None


class Optimizer(NamedTuple):
    """Optax's protocol."""

    init: Any
    update: Any


def adam_of(ad, params):
    """``(gradient, leaves, params) -> (m̂ / (√v̂ + ε), leaves)`` as users of ``ad`` have it.

    ``leaves`` of the state, the step count first, are the same for fbprop and the others.
    """
    optimizer = fbprop.optim.scale_by_adam() if ad is fbprop else scale_by_adam()
    form = jax.tree.structure(jax.eval_shape(optimizer.init, params))

    def update(gradient, leaves, params):
        scaled, state = optimizer.update(gradient, form.unflatten(leaves), params)
        return scaled, jax.tree.leaves(state)

    return update


def initial_moments(params):
    """The leaves that `adam_of` starts from; of shapes and dtypes, theirs."""
    init = fbprop.optim.scale_by_adam().init
    abstract = any(isinstance(p, jax.ShapeDtypeStruct) for p in jax.tree.leaves(params))
    return jax.tree.leaves(jax.eval_shape(init, params) if abstract else init(params))


def scale_by_adam():
    """m̂ / (√v̂ + ε) of Kingma and Ba (arXiv:1412.6980), b1 = 0.9, b2 = 0.999, ε = 1e-8."""
    return optax.scale_by_adam() if optax else plain_adam()


def plain_adam(b1=0.9, b2=0.999, epsilon=1e-8):
    """The formula on its own."""
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.int32(0), zeros, zeros

    def update(gradient, state, params=None):
        count, m, v = state
        count = count + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, gradient)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, gradient)
        c1, c2 = 1 - b1 ** count.astype(jnp.float32), 1 - b2 ** count.astype(jnp.float32)
        scaled = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + epsilon), m, v)
        return scaled, (count, m, v)

    return Optimizer(init, update)


def described() -> str:
    """Whose Adam it is on the other side."""
    return f"Optax {optax.__version__}" if optax else "plain JAX (Optax is not installed)"
