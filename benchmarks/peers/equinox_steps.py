"""Equinox, its own layers, vmapped over the batch as its users do, and their default backward."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax

from benchmarks.peers.adam_steps import trained

KEY = jax.random.key(0)


def _dense(weight, bias=None):
    layer = eqx.nn.Linear(*weight.shape, use_bias=bias is not None, key=KEY)
    layer = eqx.tree_at(lambda m: m.weight, layer, weight.T)
    return layer if bias is None else eqx.tree_at(lambda m: m.bias, layer, bias)


def _trained(model, predict, batch):
    """``predict(model, *inputs)`` gives logits of one example; the last of batch are labels."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, *batch):
        model, (*inputs, labels) = eqx.combine(params, static), batch
        logits = jax.vmap(lambda *x: predict(model, *x))(*inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return trained(loss, params, batch)


class MLP(eqx.Module):
    layers: list

    def __init__(self, params):
        self.layers = [_dense(*p) for p in params]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def mlp_step(params, batch):
    return _trained(MLP(params), lambda model, x: model(x), batch)


class Convnet(eqx.Module):
    convolutions: list
    pool: eqx.nn.MaxPool2d
    dense: MLP

    def __init__(self, params):
        kernels, dense = params
        self.convolutions = [_convolution(w) for w in kernels]
        self.pool, self.dense = eqx.nn.MaxPool2d(2, 2), MLP(dense)

    def __call__(self, x):
        for layer in self.convolutions:
            x = self.pool(jax.nn.relu(layer(x)))
        return self.dense(x.transpose(1, 2, 0).ravel())  # our flattening is of HWC


def _convolution(kernel):
    D, E = kernel.shape[2:]
    layer = eqx.nn.Conv2d(D, E, 3, padding="SAME", use_bias=False, key=KEY)
    return eqx.tree_at(lambda m: m.weight, layer, kernel.transpose(3, 2, 0, 1))


def convnet_step(params, batch):
    images, labels = batch
    batch = images.transpose(0, 3, 1, 2), labels
    return _trained(Convnet(params), lambda model, x: model(x), batch)


class CharacterModel(eqx.Module):
    embedding: eqx.nn.Embedding
    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self, params):
        w, u, b = params["cell"]
        cell = eqx.nn.LSTMCell(len(w), len(u), key=KEY)
        leaves = lambda m: (m.weight_ih, m.weight_hh, m.bias)
        self.cell = eqx.tree_at(leaves, cell, (w.T, u.T, b))
        self.embedding = eqx.nn.Embedding(weight=params["embedding"])
        self.head = _dense(*params["head"][0])

    def __call__(self, tokens):
        def step(state, token):
            state = self.cell(self.embedding(token), state)
            return state, state[0]

        zeros = jnp.zeros(self.cell.hidden_size)
        return jax.vmap(self.head)(lax.scan(step, (zeros, zeros), tokens)[1])


def lstm_character_step(params, batch):
    tokens = batch[0].T
    return _trained(CharacterModel(params), lambda model, t: model(t),
                    (tokens[:, :-1], tokens[:, 1:]))


def _norm(scale, bias):
    layer = eqx.nn.LayerNorm(scale.shape)
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (scale, bias))


class Block(eqx.Module):
    norms: list
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    heads: int

    def __init__(self, p, heads):
        self.norms, self.heads = [_norm(*n) for n in p["norms"]], heads
        self.qkv, self.out = _dense(p["qkv"]), _dense(p["out"])
        self.up, self.down = _dense(*p["up"]), _dense(*p["down"])

    def __call__(self, x):
        T, D = x.shape
        y = jax.vmap(lambda x: self.qkv(self.norms[0](x)))(x)
        q, k, v = jnp.split(y.reshape(T, 3 * self.heads, -1), 3, axis=1)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(T, D)
        x = x + jax.vmap(self.out)(y)
        hidden = jax.vmap(lambda x: self.up(self.norms[1](x)))(x)
        return x + jax.vmap(self.down)(jax.nn.gelu(hidden))


class GPT(eqx.Module):
    tokens: eqx.nn.Embedding
    positions: jax.Array
    blocks: list
    norm: eqx.nn.LayerNorm

    def __init__(self, params):
        self.tokens = eqx.nn.Embedding(weight=params["tokens"])
        self.positions, self.norm = params["positions"], _norm(*params["norm"])
        self.blocks = [Block(p, 4) for p in params["blocks"]]

    def __call__(self, tokens):
        x = jax.vmap(self.tokens)(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x) @ self.tokens.weight.T


def gpt_step(params, batch):
    tokens = batch[0]
    return _trained(GPT(params), lambda model, t: model(t), (tokens[:, :-1], tokens[:, 1:]))
