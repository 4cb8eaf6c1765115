"""Training steps on sequences: LSTM and GRU character models, GPT."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp

from benchmarks.row import row
from benchmarks.rows.contraction import causal_attention
from benchmarks.rows.elementwise import cross_entropy, normalised
from benchmarks.rows.recurrent import gru_layer, lstm_layer, recurrent_weights
from benchmarks.rows.steps import dense_layers, mlp, training_step

CHARACTERS = 96  # printable ASCII
CHARACTER_SIZES = {"smoke": [(3, 2, 5)], "small": [(32, 8, 64)], "full": [(128, 32, 256)]}


def _character_row(layer, gates, draw, T, B, H):
    params = {"embedding": draw.normal(CHARACTERS, H), "head": dense_layers(draw, H, CHARACTERS),
              "cell": recurrent_weights(draw, gates, H, H)}

    def loss(params, tokens):
        xs = params["embedding"][tokens[:-1]]
        return cross_entropy(mlp(params["head"], layer(*params["cell"], xs)), tokens[1:])

    flops = 6 * T * B * (2 * H * gates * H + H * CHARACTERS)
    return training_step(loss, params, [draw.integers(CHARACTERS, T + 1, B)], flops=flops)


@row("step", accelerator=True, full=[(256, 64, 1024)])
@row("step", **CHARACTER_SIZES)
def lstm_character_step(draw, T, B, H):
    return _character_row(lstm_layer, 4, draw, T, B, H)


@row("step", **CHARACTER_SIZES)
def gru_character_step(draw, T, B, H):
    return _character_row(gru_layer, 3, draw, T, B, H)


def transformer_params(draw, D):
    """One pre-norm block; no biases in attention, where the key's has no gradient."""
    norms = [(jnp.ones(D), jnp.zeros(D)) for _ in range(2)]
    return {"norms": norms, "qkv": draw.weight(D, 3 * D),
            "out": draw.weight(D, D),
            "up": (draw.weight(D, 4 * D), jnp.zeros(4 * D)),
            "down": (draw.weight(4 * D, D), jnp.zeros(D))}


def transformer_block(p, x, heads, causal=True):
    """x + attention(norm x), then x + dense(gelu(dense(norm x))); x is (B, T, D)."""
    B, T, D = x.shape
    qkv = normalised(x, *p["norms"][0]) @ p["qkv"]
    q, k, v = jnp.split(qkv.reshape(B, T, 3 * heads, D // heads), 3, axis=2)
    attention = causal_attention if causal else full_attention
    x = x + attention(q, k, v).reshape(B, T, D) @ p["out"]
    (up, b), (down, c) = p["up"], p["down"]
    return x + jax.nn.gelu(normalised(x, *p["norms"][1]) @ up + b) @ down + c


def full_attention(q, k, v):
    """Softmax attention of (B, T, H, D) queries, keys and values."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)


def gpt_params(draw, layers, T, D, V):
    """Token and position embeddings, blocks, final norm; the head is the token embedding."""
    return {"tokens": draw.normal(V, D, scale=0.02),
            "positions": draw.normal(T, D, scale=0.02),
            "blocks": [transformer_params(draw, D) for _ in range(layers)],
            "norm": (jnp.ones(D), jnp.zeros(D))}


def gpt_loss(heads, dtype=jnp.float32, look_up=operator.getitem):
    """Next-token cross-entropy of tokens (B, T+1): computed in ``dtype``, logits in float32."""
    def loss(params, tokens):
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        x = look_up(params["tokens"], tokens[:, :-1]) + params["positions"]
        for block in params["blocks"]:
            x = transformer_block(block, x, heads)
        logits = normalised(x, *params["norm"]) @ params["tokens"].T
        return cross_entropy(logits.astype(jnp.float32), tokens[:, 1:])

    return loss


def gpt_flops(B, T, layers, D, V):
    """6 per token and matmul weight, and 12·T·D per token and layer in attention."""
    return B * T * (6 * (12 * layers * D * D + V * D) + 12 * layers * T * D)


@row("step", smoke=[(2, 5, 1, 8, 11)], small=[(2, 64, 2, 64, 512)], full=[(8, 256, 4, 256, 8192)])
def gpt_step(draw, B, T, L, D, V):
    params, tokens = gpt_params(draw, L, T, D, V), draw.integers(V, B, T + 1)
    return training_step(gpt_loss(4), params, [tokens], flops=gpt_flops(B, T, L, D, V))


@row("step", accelerator=True, full=[(B, 1024, 12, 768, 50304) for B in (64, 32, 16)])
def gpt2_124m_step(draw, B, T, L, D, V):
    """Share of the measured bfloat16 matmul rate is its model-flops utilisation."""
    params = gpt_params(draw, L, T, D, V)
    # bfloat16 has 8 bits, and twelve blocks add their rounding up.
    return training_step(gpt_loss(12, jnp.bfloat16), params, [draw.integers(V, B, T + 1)],
                         flops=gpt_flops(B, T, L, D, V), tolerance=0.1)
