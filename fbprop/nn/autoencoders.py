"""Networks that give back what they are given, through a narrow code: autoencoder, vae."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fbprop.nn.activations import relu
from fbprop.nn.compose import sequential
from fbprop.nn.layer import Layer, function
from fbprop.nn.networks import mlp
from fbprop.nn.regularization import check_key


def autoencoder(*sizes: int, activation: Callable[[], Layer] = relu, dtype=jnp.float32,
                name: str = "autoencoder") -> Layer:
    """An `mlp` from the input to a code and its mirror image back (Hinton & Salakhutdinov 2006).

    Inputs [B, ...] of sizes[0] numbers each become [B, sizes[0]]: their reconstruction, or its
    logits, as the loss has it. Parameters: ``encoder`` and ``decoder``, each an `mlp`'s;
    ``encode, decode = net.parts`` are the two layers.

    Args:
      *sizes: numbers of an input, of each hidden layer, and of the code; the decoder has them in
        the opposite order.
      activation: makes the layer in between: `relu`, `tanh`, ...
      dtype: of the parameters.

    Raises:
      ValueError: fewer than two sizes; inputs of another size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.autoencoder(64, 32, 2)
      >>> x = jnp.ones((5, 8, 8, 1))
      >>> params = net.init(jax.random.key(0), x)
      >>> encode, decode = net.parts
      >>> net.apply(params, x).shape, encode.apply(params["encoder"], x).shape
      ((5, 64), (5, 2))
    """
    return sequential(*_both_ways("autoencoder", sizes, 1, activation, dtype), name=name)


class Reconstruction(NamedTuple):
    """What a `vae` gives: ``logits`` of the input, ``mean`` and ``log_variance`` of its code."""

    logits: jax.Array
    mean: jax.Array
    log_variance: jax.Array


def vae(*sizes: int, activation: Callable[[], Layer] = relu, dtype=jnp.float32,
        name: str = "vae") -> Layer:
    """Variational autoencoder (Kingma & Welling 2014) of two `mlp`s.

    The encoder gives mean μ and log σ² of a normal code z; in training z = μ + σ ε with ε from
    ``key``, in use z = μ; the decoder gives the logits of the input (or its mean, as the loss has
    it). The loss is the reconstruction's, summed over an input, plus `normal_divergence`.

    Parameters: ``encoder`` and ``decoder``, each an `mlp`'s; ``encode, decode = net.parts``;
    ``decode.apply(params["decoder"], z)`` of normal z draws new ones.

    Args:
      *sizes: numbers of an input, of each hidden layer, and of the code; the decoder has them in
        the opposite order.
      activation: makes the layer in between: `relu`, `tanh`, ...
      dtype: of the parameters.

    Returns of ``apply``:
      `Reconstruction`: logits [B, sizes[0]], mean and log_variance [B, sizes[-1]].

    Raises:
      ValueError: fewer than two sizes; inputs of another size; in training without a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn, ops
      >>> net = nn.vae(64, 32, 2)
      >>> def loss(params, x, key):
      ...     out = net.apply(params, x, key=key, train=True)
      ...     given = jnp.sum(ops.sigmoid_cross_entropy(out.logits, x), -1)
      ...     return jnp.mean(given + nn.normal_divergence(out.mean, out.log_variance))
      >>> x = jnp.full((5, 64), 0.5)
      >>> params = net.init(jax.random.key(0), x)
      >>> loss(params, x, jax.random.key(1)).shape, net.apply(params, x).mean.shape
      ((), (5, 2))
    """
    encoder, decoder = _both_ways("vae", sizes, 2, activation, dtype)

    def init(key, x):
        keys = jax.random.split(key)
        codes = jax.ShapeDtypeStruct((*x.shape[:1], sizes[-1]), dtype)
        return {"encoder": encoder.init(keys[0], x), "decoder": decoder.init(keys[1], codes)}

    def apply(params, x, *, key, train):
        mean, log_variance = jnp.split(encoder.apply(params["encoder"], x), 2, axis=-1)
        z = mean
        if train:
            check_key(name, key)
            noise = jax.random.normal(key, mean.shape, mean.dtype)
            z = mean + jnp.exp(log_variance / 2) * noise
        return Reconstruction(decoder.apply(params["decoder"], z), mean, log_variance)

    return Layer(init, apply, name, parts=(encoder, decoder))


def normal_divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(N(μ, σ²) ‖ N(0, 1)) = Σ (μ² + σ² − 1 − log σ²) / 2 over the last axis, in nats.

    Kingma & Welling 2014, appendix B.

    Args:
      mean, log_variance: [..., D].

    Returns:
      [...], of their dtype; 0 where μ = 0 and σ = 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> nn.normal_divergence(jnp.array([3.0, 0.0]), jnp.zeros(2)).item()
      4.5
    """
    return jnp.sum(mean**2 + jnp.expm1(log_variance) - log_variance, -1) / 2


def _both_ways(name, sizes, numbers, activation, dtype):
    """Encoder, which gives so many numbers for each of the code, and decoder."""
    if len(sizes) < 2:
        raise ValueError(
            f"{name} has sizes of its input and of its code, got {sizes} expected at least two: "
            f"nn.{name}(784, 400, 20)."
        )
    encoder = mlp(*sizes[1:-1], numbers * sizes[-1], activation=activation, dtype=dtype,
                  name="encoder")
    decoder = mlp(*sizes[-2::-1], activation=activation, dtype=dtype, name="decoder")
    return _of_size(sizes[0], encoder), decoder


def _of_size(size, encoder):
    """The encoder, which takes inputs of ``size`` numbers."""

    def checked(x):
        flat = x.reshape(x.shape[0], -1) if x.ndim > 1 else x
        if flat.ndim < 2 or flat.shape[1] != size:
            raise ValueError(
                f"Layer 'encoder' takes [B, ...] of {size} numbers each, got an input of shape "
                f"{x.shape} expected [B, {size}]: name the input's size first, or reshape it."
            )
        return flat

    return sequential(function(checked, "flat"), *encoder.parts[1:], name="encoder")
