"""Recurrent layers written as anyone would, by `lax.scan` over time, and those of `fbprop.ops`."""

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.row import operation, row
from fbprop import ops

SIZES = {
    "smoke": [(5, 2, 3)],
    "small": [(32, 8, 64)],
    "full": [(256, 16, 512), (64, 32, 128), (128, 64, 256)],
}


def lstm_layer(w, u, b, xs, zeros=None):
    """Hidden states (T, B, H) of an LSTM that starts from zeros; gates i, f, g, o."""
    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ w + h @ u + b, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    if zeros is None:
        zeros = jnp.zeros((xs.shape[1], u.shape[0]), xs.dtype)
    return lax.scan(step, (zeros, zeros), xs)[1]


def gru_layer(w, u, b, xs):
    """Hidden states (T, B, H) of a GRU that starts from zeros; gates r, z, candidate n."""
    def step(h, x):
        x_r, x_z, x_n = jnp.split(x @ w + b, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(h @ u, 3, axis=-1)
        r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        h = (1 - z) * jnp.tanh(x_n + r * h_n) + z * h
        return h, h

    return lax.scan(step, jnp.zeros((xs.shape[1], u.shape[0]), xs.dtype), xs)[1]


def recurrent_weights(draw, gates, D, H):
    """Input weights (D, gates·H), recurrent weights (H, gates·H), bias."""
    return draw.weight(D, gates * H), draw.weight(H, gates * H), draw.normal(gates * H, scale=0.1)


def rnn_layer(w, u, b, xs):
    """Hidden states (T, B, H) of a simple recurrent network that starts from zeros."""
    def step(h, x):
        h = jnp.tanh(x @ w + h @ u + b)
        return h, h

    return lax.scan(step, jnp.zeros((xs.shape[1], u.shape[0]), xs.dtype), xs)[1]


def _row(layer, gates, draw, T, B, H):
    weights, xs = recurrent_weights(draw, gates, H, H), draw.normal(T, B, H)
    flops = 3 * 2 * T * B * 2 * H * gates * H
    # 256 steps of float32 add up rounding in another order: 1e-6 per element, more in the sums.
    return operation(layer, [*weights, xs], flops=flops, tolerance=1e-4)


@row(**SIZES)
def lstm(draw, T, B, H):
    return _row(lstm_layer, 4, draw, T, B, H)


@row(**SIZES)
def gru(draw, T, B, H):
    return _row(gru_layer, 3, draw, T, B, H)


def _of_ops(layer, ours, gates, draw, T, B, H):
    """The operation against plain code, batch first as layers are."""
    weights, xs = recurrent_weights(draw, gates, H, H), draw.normal(B, T, H)
    return operation(
        lambda w, u, b, xs: layer(w, u, b, xs.swapaxes(0, 1)).swapaxes(0, 1), [*weights, xs],
        ours=lambda w, u, b, xs: ours(xs, w, u, b)[0], flops=3 * 2 * T * B * 2 * H * gates * H,
        tolerance=1e-4,
    )


@row(**SIZES)
def ops_lstm(draw, T, B, H):
    return _of_ops(lstm_layer, ops.lstm, 4, draw, T, B, H)


@row(**SIZES)
def ops_gru(draw, T, B, H):
    return _of_ops(gru_layer, ops.gru, 3, draw, T, B, H)


@row(**SIZES)
def ops_rnn(draw, T, B, H):
    return _of_ops(rnn_layer, ops.rnn, 1, draw, T, B, H)
