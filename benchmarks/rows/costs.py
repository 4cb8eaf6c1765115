"""What fbprop itself costs: compile time of a large network, un-jitted gradients of a small one;
and gradients of the three networks that must never be slower, without an optimiser around them."""

import jax.numpy as jnp

from benchmarks.row import loss_gradient, row
from benchmarks.rows.recurrent import lstm_layer, recurrent_weights
from benchmarks.rows.sequence_steps import gpt_loss, gpt_params
from benchmarks.rows.steps import MLP_FLOPS, SIZES, classification, dense_layers, mlp


@row("cost", smoke=[(2, 5, 2, 8, 11)], small=[(2, 16, 12, 64, 64)], full=[(2, 16, 12, 64, 64)])
def transformer_compile(draw, B, T, L, D, V):
    """Read the compile column: tracing, lowering and compiling 12 unrolled blocks."""
    params, tokens = gpt_params(draw, L, T, D, V), draw.integers(V, B, T + 1)
    return loss_gradient(gpt_loss(4), params, [tokens], tolerance=1e-4)


@row("cost", smoke=[(3, 5)], small=[(32, 64)], full=[(32, 64)])
def mlp_eager(draw, B, D):
    """Un-jitted gradient of a small network: tracing and dispatch, hardly any arithmetic."""
    params, x = dense_layers(draw, D, D, D, 10), draw.normal(B, D)
    labels = draw.integers(10, B)
    return loss_gradient(classification(mlp), params, [x, labels], jitted=False)


@row("gradient", smoke=[(3,)], small=[(128,)], full=[(128,)])
def mlp_gradient(draw, B):
    """Forward and backward without Adam, as the next two."""
    batch = draw.normal(B, 784), draw.integers(10, B)
    return loss_gradient(classification(mlp), dense_layers(draw, *SIZES), batch,
                         flops=MLP_FLOPS * B)


@row("gradient", smoke=[(3, 2, 5)], small=[(64, 32, 128)], full=[(64, 32, 128)])
def lstm_gradient(draw, T, B, H):
    params, xs = recurrent_weights(draw, 4, H, H), draw.normal(T, B, H)
    loss = lambda params, xs: jnp.mean(lstm_layer(*params, xs) ** 2)
    return loss_gradient(loss, params, [xs], tolerance=1e-4, flops=6 * T * B * 8 * H * H)


@row("gradient", smoke=[(2, 5, 8)], small=[(8, 64, 128)], full=[(8, 256, 256)])
def transformer_block_gradient(draw, B, T, D):
    params, tokens = gpt_params(draw, 1, T, D, 97), draw.integers(97, B, T + 1)
    return loss_gradient(gpt_loss(4), params, [tokens], tolerance=1e-4)
