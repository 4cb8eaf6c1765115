"""Flax (linen), its own layers and their default backward."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.peers.adam_steps import trained


def _dense(weight, bias=None):
    return {"kernel": weight} | ({} if bias is None else {"bias": bias})


def _classified(model):
    def loss(params, x, labels):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def _dense_params(layers):
    return {f"Dense_{i}": _dense(*p) for i, p in enumerate(layers)}


class MLP(nn.Module):
    sizes: tuple

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.relu(nn.Dense(size)(x))
        return nn.Dense(self.sizes[-1])(x)


def mlp_step(params, batch):
    model = MLP(tuple(b.size for _, b in params))
    return trained(_classified(model), _dense_params(params), batch)


class Convnet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for channels in (32, 64):
            x = nn.relu(nn.Conv(channels, (3, 3), use_bias=False)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return MLP((128, 10))(x.reshape(len(x), -1))


def convnet_step(params, batch):
    kernels, layers = params
    tree = {f"Conv_{i}": _dense(w) for i, w in enumerate(kernels)}
    return trained(_classified(Convnet()), tree | {"MLP_0": _dense_params(layers)}, batch)


class CharacterModel(nn.Module):
    characters: int
    hidden: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.characters, self.hidden)(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(self.hidden, name="cell"), time_major=True)(x)
        return nn.Dense(self.characters)(x)


def lstm_character_step(params, batch):
    w, u, b = (jnp.split(p, 4, axis=-1) for p in params["cell"])
    cell = {f"i{g}": {"kernel": x} for g, x in zip("ifgo", w)}
    cell |= {f"h{g}": {"kernel": x, "bias": c} for g, x, c in zip("ifgo", u, b)}
    tree = {"Embed_0": {"embedding": params["embedding"]}, "cell": cell,
            "Dense_0": _dense(*params["head"][0])}
    model = CharacterModel(*params["embedding"].shape)
    loss = _classified(model)
    return trained(lambda params, t: loss(params, t[:-1], t[1:]), tree, batch)


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        B, T, D = x.shape
        qkv = nn.Dense(3 * D, use_bias=False, name="qkv")(nn.LayerNorm(1e-5, name="norm0")(x))
        q, k, v = jnp.split(qkv.reshape(B, T, 3 * self.heads, -1), 3, axis=2)
        y = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(jnp.ones((B, T))))
        x = x + nn.Dense(D, use_bias=False, name="out")(y.reshape(B, T, D))
        y = nn.gelu(nn.Dense(4 * D, name="up")(nn.LayerNorm(1e-5, name="norm1")(x)))
        return x + nn.Dense(D, name="down")(y)


def _norm(scale, bias):
    return {"scale": scale, "bias": bias}


def _block_params(p):
    norms = {f"norm{i}": _norm(*n) for i, n in enumerate(p["norms"])}
    return norms | {"qkv": _dense(p["qkv"]), "out": _dense(p["out"]), "up": _dense(*p["up"]),
                    "down": _dense(*p["down"])}


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
    blocks = {f"block{i}": _block_params(p) for i, p in enumerate(params["blocks"])}
    tree = {"embed": {"embedding": params["tokens"]}, "positions": params["positions"],
            "norm": _norm(*params["norm"]), **blocks}
    loss = _classified(GPT(V, len(params["positions"]), D, len(blocks)))
    return trained(lambda params, t: loss(params, t[:, :-1], t[:, 1:]), tree, batch)
