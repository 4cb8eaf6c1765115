"""Equinox's steps of word embeddings, a graph network, a physics-informed network."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.peers.adam_steps import trained
from benchmarks.peers.equinox_layers import MLP, cross_entropy, embedding, split


def word_embedding_step(params, batch):
    def one(model, centre, context, negatives):
        inputs, outputs = model
        x = inputs(centre)
        near, far = x @ outputs(context), jax.vmap(outputs)(negatives) @ x
        return -(jax.nn.log_sigmoid(near) + jax.nn.log_sigmoid(-far).sum())

    def loss(model, *batch):
        return jax.vmap(lambda *each: one(model, *each))(*batch).mean()

    return trained(*split(tuple(map(embedding, params)), loss), batch)


class GraphNetwork(eqx.Module):
    layers: list
    head: MLP

    def __init__(self, params):
        layers, head = params
        self.layers = [(MLP(message), MLP(update)) for message, update in layers]
        self.head = MLP(head)

    def __call__(self, x, senders, receivers):
        for message, update in self.layers:
            edges = jnp.concatenate([x[senders], x[receivers]], axis=-1)
            messages = jax.nn.relu(jax.vmap(message)(edges))
            sums = jax.ops.segment_sum(messages, receivers, len(x))
            x = x + jax.vmap(update)(jnp.concatenate([x, sums], axis=-1))
        return jax.vmap(self.head)(x)


def graph_network_step(params, batch):
    def loss(model, x, senders, receivers, labels):
        return cross_entropy(model(x, senders, receivers), labels)

    return trained(*split(GraphNetwork(params), loss), batch)


def physics_informed_step(params, batch):
    def loss(model, points):
        def u(t, x):
            return model(jnp.stack([t, x]), jnp.tanh)[0]

        def residual(point):
            t, x = point
            u_t, u_x = jax.grad(u, argnums=(0, 1))(t, x)
            u_xx = jax.grad(jax.grad(u, 1), 1)(t, x)
            return u_t + u(t, x) * u_x - 0.01 / jnp.pi * u_xx

        return (jax.vmap(residual)(points) ** 2).mean()

    return trained(*split(MLP(params), loss), batch)
