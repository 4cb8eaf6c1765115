"""What Flax's steps share: our weights as its parameters, an MLP, a transformer block, a loss."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from flax import linen as nn


def dense(weight, bias=None):
    """Parameters of nn.Dense or nn.Conv."""
    return {"kernel": weight} | ({} if bias is None else {"bias": bias})


def norm(scale, bias):
    return {"scale": scale, "bias": bias}


def mlp(layers):
    """Parameters of `MLP`."""
    return {f"Dense_{i}": dense(*p) for i, p in enumerate(layers)}


def sizes(layers):
    return tuple(b.size for _, b in layers)


def classified(model):
    """Mean cross-entropy of a model whose last argument are integer labels."""
    def loss(params, *batch):
        *inputs, labels = batch
        logits = model.apply({"params": params}, *inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


class MLP(nn.Module):
    sizes: tuple

    @nn.compact
    def __call__(self, x, activation=nn.relu):
        for size in self.sizes[:-1]:
            x = activation(nn.Dense(size)(x))
        return nn.Dense(self.sizes[-1])(x)


class Block(nn.Module):
    """Pre-norm transformer block of (B, T, D)."""

    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x):
        B, T, D = x.shape
        qkv = nn.Dense(3 * D, use_bias=False, name="qkv")(nn.LayerNorm(1e-5, name="norm0")(x))
        q, k, v = jnp.split(qkv.reshape(B, T, 3 * self.heads, -1), 3, axis=2)
        mask = nn.make_causal_mask(jnp.ones((B, T))) if self.causal else None
        y = nn.dot_product_attention(q, k, v, mask=mask)
        x = x + nn.Dense(D, use_bias=False, name="out")(y.reshape(B, T, D))
        y = nn.gelu(nn.Dense(4 * D, name="up")(nn.LayerNorm(1e-5, name="norm1")(x)))
        return x + nn.Dense(D, name="down")(y)


def blocks(params):
    """Parameters of blocks by their names, block0 first."""
    return {f"block{i}": _block(p) for i, p in enumerate(params)}


def _block(p):
    norms = {f"norm{i}": norm(*n) for i, n in enumerate(p["norms"])}
    return norms | {"qkv": dense(p["qkv"]), "out": dense(p["out"]), "up": dense(*p["up"]),
                    "down": dense(*p["down"])}
