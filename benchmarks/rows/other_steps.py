"""Training steps of word embeddings, a graph network, a physics-informed network."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.row import row
from benchmarks.rows.steps import classification, dense_layers, mlp, training_step


def word_loss(params, centres, contexts, negatives):
    """Skip-gram with negative sampling, Mikolov et al. 2013 (arXiv:1310.4546), equation 4."""
    inputs, outputs = params
    x = inputs[centres]
    near = jnp.sum(x * outputs[contexts], axis=-1)
    far = jnp.einsum("bd,bnd->bn", x, outputs[negatives])
    return -jnp.mean(jax.nn.log_sigmoid(near) + jax.nn.log_sigmoid(-far).sum(-1))


@row("step", accelerator=True, full=[(8192, 262144, 128, 5)])
@row("step", smoke=[(3, 11, 4, 2)], small=[(256, 4000, 64, 5)], full=[(1024, 32000, 128, 5)])
def word_embedding_step(draw, B, V, D, negatives):
    params = draw.normal(V, D, scale=0.1), draw.normal(V, D, scale=0.1)
    batch = draw.integers(V, B), draw.integers(V, B), draw.integers(V, B, negatives)
    return training_step(word_loss, params, batch)


def graph_network(params, x, senders, receivers):
    """Node logits: per layer, messages from (sender, receiver) summed by receiver, a residual."""
    layers, head = params
    for message, update in layers:
        edges = jnp.concatenate([x[senders], x[receivers]], axis=-1)
        sums = jax.ops.segment_sum(jax.nn.relu(mlp(message, edges)), receivers, len(x))
        x = x + mlp(update, jnp.concatenate([x, sums], axis=-1))
    return mlp(head, x)


@row("step", smoke=[(7, 13, 5)], small=[(512, 2048, 32)], full=[(4096, 16384, 64)])
def graph_network_step(draw, N, E, D):
    layers = [(dense_layers(draw, 2 * D, D), dense_layers(draw, 2 * D, D, D)) for _ in range(3)]
    params = layers, dense_layers(draw, D, 10)
    batch = draw.normal(N, D), draw.integers(N, E), draw.integers(N, E), draw.integers(10, N)

    def loss(params, x, senders, receivers, labels):
        apply = lambda params, x: graph_network(params, x, senders, receivers)
        return classification(apply)(params, x, labels)

    return training_step(loss, params, batch)


def burgers_loss(params, points):
    """Mean squared residual of uₜ + u uₓ = ν uₓₓ (Raissi et al. 2019, section 3.1).

    The inner derivatives are `jax.grad`'s in both programs: what differs is the outer gradient.
    """
    def u(t, x):
        return mlp(params, jnp.stack([t, x]), jnp.tanh)[0]

    def residual(point):
        t, x = point
        u_t, u_x = jax.grad(u, argnums=(0, 1))(t, x)
        u_xx = jax.grad(jax.grad(u, 1), 1)(t, x)
        return u_t + u(t, x) * u_x - 0.01 / jnp.pi * u_xx

    return jnp.mean(jax.vmap(residual)(points) ** 2)


@row("step", smoke=[(3, 5)], small=[(256, 32)], full=[(4096, 64)])
def physics_informed_step(draw, B, hidden):
    params = dense_layers(draw, 2, hidden, hidden, hidden, 1)
    # The last bias moves u alone, by which the residual hardly changes: its gradient is rounding.
    return training_step(burgers_loss, params, [draw.normal(B, 2)], tolerance=1e-3)
