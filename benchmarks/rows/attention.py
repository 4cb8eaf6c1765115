"""Attention: `fbprop.ops.attention` against plain code under `jax.grad`."""

import math

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.row import operation, row


def plain(q, k, v):
    """Causal attention as it is mostly written."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


@row(smoke=[(2, 3, 67, 5)], small=[(2, 4, 256, 32)],
     full=[(4, 8, 1024, 64), (4, 8, 256, 64), (32, 4, 64, 64)])
def causal_attention(draw, B, H, T, D):
    q, k, v = (draw.normal(B, T, H, D) for _ in range(3))
    return operation(plain, [q, k, v], ours=lambda *x: fbprop.ops.attention(*x, causal=True),
                     flops=3.5 * 2 * B * H * T * T * D)


@row(accelerator=True, full=[(16, 12, 1024, 64)])
def causal_attention_16bit(draw, B, H, T, D):
    q, k, v = (draw.normal(B, T, H, D, dtype=jnp.bfloat16) for _ in range(3))
    return operation(plain, [q, k, v], ours=lambda *x: fbprop.ops.attention(*x, causal=True),
                     tolerance=2e-2, flops=3.5 * 2 * B * H * T * T * D)
