"""What Equinox's steps share: its layers with our weights, an MLP, a block, a loss over a batch.

Models take one example and are vmapped over the batch, as Equinox's users have it.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

KEY = jax.random.key(0)  # layers draw weights of their own before they are given ours


def dense(weight, bias=None):
    layer = eqx.nn.Linear(*weight.shape, use_bias=bias is not None, key=KEY)
    layer = eqx.tree_at(lambda m: m.weight, layer, weight.T)
    return layer if bias is None else eqx.tree_at(lambda m: m.bias, layer, bias)


def affine(layer, scale, bias):
    """A normalisation layer with our scale and bias."""
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (scale, bias))


def layer_norm(scale, bias):
    return affine(eqx.nn.LayerNorm(scale.shape), scale, bias)


def embedding(table):
    return eqx.nn.Embedding(weight=table)


def split(model, loss):
    """Inexact arrays of a model and ``loss(model, *batch)`` as a function of them."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, *batch: loss(eqx.combine(params, static), *batch), params


def classified(model, predict):
    """``predict(model, *inputs)`` gives logits of one example; the last of a batch are labels."""
    def loss(model, *batch):
        *inputs, labels = batch
        return cross_entropy(jax.vmap(lambda *x: predict(model, *x))(*inputs), labels)

    return split(model, loss)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class MLP(eqx.Module):
    layers: list

    def __init__(self, params):
        self.layers = [dense(*p) for p in params]

    def __call__(self, x, activation=jax.nn.relu):
        for layer in self.layers[:-1]:
            x = activation(layer(x))
        return self.layers[-1](x)


class Block(eqx.Module):
    """Pre-norm transformer block of (T, D)."""

    norms: list
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    heads: int
    causal: bool

    def __init__(self, p, heads, causal=True):
        self.norms, self.heads, self.causal = [layer_norm(*n) for n in p["norms"]], heads, causal
        self.qkv, self.out = dense(p["qkv"]), dense(p["out"])
        self.up, self.down = dense(*p["up"]), dense(*p["down"])

    def __call__(self, x):
        T, D = x.shape
        y = jax.vmap(lambda x: self.qkv(self.norms[0](x)))(x)
        q, k, v = jnp.split(y.reshape(T, 3 * self.heads, -1), 3, axis=1)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(T, D)
        x = x + jax.vmap(self.out)(y)
        hidden = jax.vmap(lambda x: self.up(self.norms[1](x)))(x)
        return x + jax.vmap(self.down)(jax.nn.gelu(hidden))
