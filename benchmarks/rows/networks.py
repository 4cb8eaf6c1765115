"""Whole networks of `fbprop.nn` and `fbprop.ops` against the same in plain code under `jax.grad`.

Steps with Adam, on the parameters of the plain code's rows; Flax's steps are those rows' too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.row import row
from benchmarks.rows.image_steps import resnet, resnet_params
from benchmarks.rows.recurrent import lstm_layer, recurrent_weights
from benchmarks.rows.sequence_steps import CHARACTER_SIZES, CHARACTERS, gpt_loss, gpt_params
from benchmarks.rows.steps import classification, cross_entropy, dense_layers, mlp, training_step
from fbprop import nn, ops


def transformer_block(p, x, heads):
    """A block of `nn` layers on the parameters of `sequence_steps.transformer_params`."""
    D = x.shape[-1]
    norms = [{"scale": scale, "bias": bias} for scale, bias in p["norms"]]
    up, down = ({"kernel": w, "bias": b} for w, b in (p["up"], p["down"]))
    attention = nn.residual(nn.layer_norm(), nn.attention(heads, causal=True, bias=False))
    x = attention.apply({"layer_norm": norms[0], "attention": {
        "qkv": {"kernel": p["qkv"]}, "out": {"kernel": p["out"]}}}, x)
    z = nn.dense(4 * D).apply(up, nn.layer_norm().apply(norms[1], x))
    # Kept is z, of which GELU is made again: without it 20.4 GB for 15.6.
    narrow = jax.checkpoint(lambda p, z: nn.dense(D).apply(p, nn.gelu().apply({}, z)))
    return x + narrow(down, z)


def gpt_of_layers(heads, dtype=jnp.float32):
    """As `sequence_steps.gpt_loss`: the head and its loss are one operation."""
    def loss(params, tokens):
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        x = params["tokens"][tokens[:, :-1]] + params["positions"]
        for block in params["blocks"]:
            x = transformer_block(block, x, heads)
        scale, bias = params["norm"]
        hidden = nn.layer_norm().apply({"scale": scale, "bias": bias}, x)
        return ops.linear_cross_entropy(hidden, params["tokens"].T, tokens[:, 1:])

    return loss


@row("network", smoke=[(2, 5, 1, 8, 11)], small=[(2, 64, 2, 64, 512)],
     full=[(8, 256, 4, 256, 8192)])
def gpt_network(draw, B, T, L, D, V):
    params, tokens = gpt_params(draw, L, T, D, V), draw.integers(V, B, T + 1)
    return training_step(gpt_loss(4), params, [tokens], ours=gpt_of_layers(4))


@row("network", accelerator=True, full=[(64, 1024, 12, 768, 50304)])
def gpt2_124m_network(draw, B, T, L, D, V):
    # bfloat16 has 8 bits, and twelve blocks add their rounding up.
    return training_step(gpt_loss(12, jnp.bfloat16), gpt_params(draw, L, T, D, V),
                         [draw.integers(V, B, T + 1)], ours=gpt_of_layers(12, jnp.bfloat16),
                         tolerance=0.1)


def _convolved(x, kernel, norm, stride=1):
    """A convolution and batch norm; running statistics are not used, and not computed."""
    conv = nn.conv(kernel.shape[-1], kernel.shape[0], stride=stride, bias=False)
    y, layer, (scale, bias) = conv.apply({"kernel": kernel}, x), nn.batch_norm(), norm
    return layer.apply({"scale": scale, "bias": bias}, y, train=True, state=layer.init_state(y))[0]


def resnet_of_layers(params, x, labels):
    x = jax.nn.relu(_convolved(x, params["stem"], params["norm"]))
    for p in params["blocks"]:
        stride = 2 if "project" in p else 1
        y = jax.nn.relu(_convolved(x, p["conv1"], p["norm1"], stride))
        y = _convolved(y, p["conv2"], p["norm2"])
        if stride == 2:
            shortcut = nn.conv(y.shape[-1], 1, stride=2, bias=False)
            x = shortcut.apply({"kernel": p["project"]}, x)
        x = jax.nn.relu(x + y)
    ((w, b),) = params["head"]
    logits = nn.dense(10).apply({"kernel": w, "bias": b}, nn.global_avg_pool().apply({}, x))
    return nn.softmax_cross_entropy(logits, labels)


@row("network", smoke=[(2, 8, 1, 4)], small=[(8, 16, 1, 16)], full=[(32, 32, 3, 16)])
def resnet_network(draw, B, H, blocks, width):
    batch = draw.normal(B, H, H, 3), draw.integers(10, B)
    # Rounding passes through one normalisation per convolution: 1e-4 after twenty of them.
    return training_step(classification(resnet), resnet_params(draw, blocks, width), batch,
                         ours=resnet_of_layers, tolerance=1e-3)


def lstm_plain(params, tokens):
    xs = params["embedding"][tokens[:-1]]
    return cross_entropy(mlp(params["head"], lstm_layer(*params["cell"], xs)), tokens[1:])


def lstm_of_layers(params, tokens):
    """Batch first, as layers have it."""
    (kernel, recurrent, bias), ((w, b),) = params["cell"], params["head"]
    x = params["embedding"][tokens[:-1].T]
    cell = {"kernel": kernel, "recurrent": recurrent, "bias": bias}
    hidden = nn.lstm(recurrent.shape[0]).apply(cell, x)
    return nn.softmax_cross_entropy(nn.dense(CHARACTERS).apply({"kernel": w, "bias": b}, hidden),
                                    tokens[1:].T)


@row("network", **CHARACTER_SIZES)
def lstm_network(draw, T, B, H):
    params = {"embedding": draw.normal(CHARACTERS, H), "head": dense_layers(draw, H, CHARACTERS),
              "cell": recurrent_weights(draw, 4, H, H)}
    return training_step(lstm_plain, params, [draw.integers(CHARACTERS, T + 1, B)],
                         ours=lstm_of_layers)
