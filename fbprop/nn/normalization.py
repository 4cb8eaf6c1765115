"""Layers that standardise."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from fbprop.nn import initializers
from fbprop.nn.layer import Layer
from fbprop.nn.shapes import at_least_float32


def layer_norm(*, epsilon: float = 1e-5, scale: bool = True, bias: bool = True,
               dtype=jnp.float32, name: str = "layer_norm") -> Layer:
    """(x − mean) / sqrt(variance + epsilon) · scale + bias over the last dimension.

    Mean and variance (divided by n) are computed in float32 at least. Ba, Kiros & Hinton 2016.
    Parameters: ``scale`` [features], at first 1; ``bias`` [features], at first 0.

    Args:
      epsilon: added to the variance, so that a constant row gives 0.
      scale, bias: whether there is one.
      dtype: of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> init, apply = nn.layer_norm(epsilon=0.0)
      >>> x = jnp.array([[1.0, 3.0]])
      >>> apply(init(jax.random.key(0), x), x).tolist()
      [[-1.0, 1.0]]
    """

    def init(key, x):
        shape = x.shape[-1:]
        params = {"scale": initializers.ones(key, shape, dtype)} if scale else {}
        return params | ({"bias": initializers.zeros(key, shape, dtype)} if bias else {})

    def apply(params, x, **_):
        wide = at_least_float32(x)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = (centred * lax.rsqrt(variance + epsilon)).astype(x.dtype)
        y = y * params["scale"] if scale else y
        return y + params["bias"] if bias else y

    return Layer(init, apply, name)
