"""Equinox's steps on sequences."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.peers.adam_steps import trained
from benchmarks.peers.equinox_layers import KEY, Block, classified, dense, embedding, layer_norm


class CharacterModel(eqx.Module):
    embedding: eqx.nn.Embedding
    cell: eqx.nn.LSTMCell | eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, params, cell):
        self.embedding, self.head = embedding(params["embedding"]), dense(*params["head"][0])
        self.cell = cell

    def __call__(self, tokens):
        lstm = isinstance(self.cell, eqx.nn.LSTMCell)

        def step(state, token):
            state = self.cell(self.embedding(token), state)
            return state, state[0] if lstm else state

        zeros = jnp.zeros(self.cell.hidden_size)
        hidden = lax.scan(step, (zeros, zeros) if lstm else zeros, tokens)[1]
        return jax.vmap(self.head)(hidden)


def _character_step(cell, params, batch):
    tokens = batch[0].T
    loss, params = classified(CharacterModel(params, cell), lambda model, t: model(t))
    return trained(loss, params, (tokens[:, :-1], tokens[:, 1:]))


def lstm_character_step(params, batch):
    w, u, b = params["cell"]
    cell = eqx.nn.LSTMCell(len(w), len(u), key=KEY)
    leaves = lambda m: (m.weight_ih, m.weight_hh, m.bias)
    return _character_step(eqx.tree_at(leaves, cell, (w.T, u.T, b)), params, batch)


def gru_character_step(params, batch):
    w, u, b = params["cell"]
    cell = eqx.nn.GRUCell(len(w), len(u), key=KEY)
    leaves = lambda m: (m.weight_ih, m.weight_hh, m.bias, m.bias_n)
    # Its candidate gate has a second bias, which ours has not.
    values = w.T, u.T, b, jnp.zeros(len(u))
    return _character_step(eqx.tree_at(leaves, cell, values), params, batch)


class GPT(eqx.Module):
    tokens: eqx.nn.Embedding
    positions: jax.Array
    blocks: list
    norm: eqx.nn.LayerNorm

    def __init__(self, params):
        self.tokens, self.positions = embedding(params["tokens"]), params["positions"]
        self.blocks = [Block(p, 4) for p in params["blocks"]]
        self.norm = layer_norm(*params["norm"])

    def __call__(self, tokens):
        x = jax.vmap(self.tokens)(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x) @ self.tokens.weight.T


def gpt_step(params, batch):
    (tokens,) = batch
    loss, params = classified(GPT(params), lambda model, t: model(t))
    return trained(loss, params, (tokens[:, :-1], tokens[:, 1:]))
