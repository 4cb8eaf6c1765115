"""Flax's steps of word embeddings, a graph network, a physics-informed network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.peers.adam_steps import trained
from benchmarks.peers.flax_layers import MLP, classified, mlp, sizes


class SkipGram(nn.Module):
    words: int
    features: int

    @nn.compact
    def __call__(self, centres, contexts, negatives):
        x = nn.Embed(self.words, self.features, name="inputs")(centres)
        outputs = nn.Embed(self.words, self.features, name="outputs")
        near = (x * outputs(contexts)).sum(-1)
        far = jnp.einsum("bd,bnd->bn", x, outputs(negatives))
        return -(nn.log_sigmoid(near) + nn.log_sigmoid(-far).sum(-1)).mean()


def word_embedding_step(params, batch):
    model = SkipGram(*params[0].shape)
    tree = {name: {"embedding": p} for name, p in zip(("inputs", "outputs"), params)}
    return trained(lambda params, *batch: model.apply({"params": params}, *batch), tree, batch)


class GraphNetwork(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x, senders, receivers):
        N, D = x.shape
        for i in range(self.layers):
            edges = jnp.concatenate([x[senders], x[receivers]], axis=-1)
            messages = nn.relu(MLP((D,), name=f"message{i}")(edges))
            sums = jax.ops.segment_sum(messages, receivers, N)
            x = x + MLP((D, D), name=f"update{i}")(jnp.concatenate([x, sums], axis=-1))
        return MLP((10,), name="head")(x)


def graph_network_step(params, batch):
    layers, head = params
    tree = {"head": mlp(head)}
    for i, (message, update) in enumerate(layers):
        tree |= {f"message{i}": mlp(message), f"update{i}": mlp(update)}
    return trained(classified(GraphNetwork(len(layers))), tree, batch)


def physics_informed_step(params, batch):
    model = MLP(sizes(params))

    def loss(params, points):
        def u(t, x):
            return model.apply({"params": params}, jnp.stack([t, x]), nn.tanh)[0]

        def residual(point):
            t, x = point
            u_t, u_x = jax.grad(u, argnums=(0, 1))(t, x)
            u_xx = jax.grad(jax.grad(u, 1), 1)(t, x)
            return u_t + u(t, x) * u_x - 0.01 / jnp.pi * u_xx

        return (jax.vmap(residual)(points) ** 2).mean()

    return trained(loss, mlp(params), batch)
