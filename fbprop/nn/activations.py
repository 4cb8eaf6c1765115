"""Activations as layers, so that they stand in a `sequential`; `function` makes any other one.

Each keeps shape and dtype and has no parameters.

Example:
  >>> import jax.numpy as jnp
  >>> from fbprop import nn
  >>> x = jnp.array([-1.0, 2.0])
  >>> nn.relu().apply({}, x).tolist(), nn.leaky_relu(0.5).apply({}, x).tolist()
  ([0.0, 2.0], [-0.5, 2.0])
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from fbprop.nn.layer import Layer, function


def relu() -> Layer:
    """max(x, 0); slope 0 at the kink, as `jax.nn.relu`."""
    return function(jax.nn.relu, "relu")


def leaky_relu(negative_slope: float = 0.01) -> Layer:
    """x for x >= 0, negative_slope · x below (Maas et al. 2013)."""
    slope = functools.partial(jax.nn.leaky_relu, negative_slope=negative_slope)
    return function(slope, "leaky_relu")


def elu(alpha: float = 1.0) -> Layer:
    """x for x > 0, alpha (eˣ − 1) below (Clevert et al. 2016)."""
    return function(functools.partial(jax.nn.elu, alpha=alpha), "elu")


def gelu(*, approximate: bool = True) -> Layer:
    """x Φ(x), Φ the normal distribution function (Hendrycks & Gimpel 2016), or its tanh form."""
    return function(functools.partial(jax.nn.gelu, approximate=approximate), "gelu")


def silu() -> Layer:
    """x · sigmoid(x), also called swish (Elfwing et al. 2018)."""
    return function(jax.nn.silu, "silu")


def softplus() -> Layer:
    """log(1 + eˣ)."""
    return function(jax.nn.softplus, "softplus")


def sigmoid() -> Layer:
    """1 / (1 + e⁻ˣ)."""
    return function(jax.nn.sigmoid, "sigmoid")


def tanh() -> Layer:
    """tanh x."""
    return function(jnp.tanh, "tanh")
