"""Flax's steps on sequences."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from benchmarks.peers.adam_steps import trained
from benchmarks.peers.flax_layers import Block, blocks, classified, dense, norm


class CharacterModel(nn.Module):
    cell: type
    characters: int
    hidden: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.characters, self.hidden)(tokens)
        x = nn.RNN(self.cell(self.hidden, name="cell"), time_major=True)(x)
        return nn.Dense(self.characters)(x)


def _character_step(cell, cell_params, params, batch):
    tree = {"Embed_0": {"embedding": params["embedding"]}, "cell": cell_params,
            "Dense_0": dense(*params["head"][0])}
    loss = classified(CharacterModel(cell, *params["embedding"].shape))
    return trained(lambda params, t: loss(params, t[:-1], t[1:]), tree, batch)


def lstm_character_step(params, batch):
    w, u, b = (jnp.split(p, 4, axis=-1) for p in params["cell"])
    cell = {f"i{g}": dense(x) for g, x in zip("ifgo", w)}
    cell |= {f"h{g}": dense(x, c) for g, x, c in zip("ifgo", u, b)}
    return _character_step(nn.OptimizedLSTMCell, cell, params, batch)


def gru_character_step(params, batch):
    w, u, b = (jnp.split(p, 3, axis=-1) for p in params["cell"])
    cell = {f"i{g}": dense(x, c) for g, x, c in zip("rzn", w, b)}
    cell |= {f"h{g}": dense(x) for g, x in zip("rzn", u)}
    cell["hn"] |= {"bias": jnp.zeros_like(b[2])}  # a bias that ours has not
    return _character_step(nn.GRUCell, cell, params, batch)


class GPT(nn.Module):
    tokens: int
    positions: int
    features: int
    layers: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.tokens, self.features, name="embed")
        positions = self.param("positions", nn.initializers.zeros, (self.positions, self.features))
        x = embed(tokens) + positions
        for i in range(self.layers):
            x = Block(4, name=f"block{i}")(x)
        return embed.attend(nn.LayerNorm(1e-5, name="norm")(x))


def gpt_step(params, batch):
    V, D = params["tokens"].shape
    tree = {"embed": {"embedding": params["tokens"]}, "positions": params["positions"],
            "norm": norm(*params["norm"]), **blocks(params["blocks"])}
    loss = classified(GPT(V, len(params["positions"]), D, len(params["blocks"])))
    return trained(lambda params, t: loss(params, t[:, :-1], t[:, 1:]), tree, batch)


gpt_network, lstm_network = gpt_step, lstm_character_step
