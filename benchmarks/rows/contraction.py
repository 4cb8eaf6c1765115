"""Matrix products as they stand in networks: a dense layer on rank 3, and attention."""

import jax
import jax.numpy as jnp

from benchmarks.row import operation, row


@row(smoke=[(2, 3, 5, 7)], small=[(8, 64, 128, 128)],
     full=[(16, 256, 256, 1024), (16, 256, 256, 256), (32, 128, 512, 512), (8, 64, 128, 128)])
def dense_rank_3(draw, B, T, D, E):
    x, w, b = draw.normal(B, T, D), draw.weight(D, E), draw.normal(E)
    return operation(lambda x, w, b: x @ w + b, [x, w, b], flops=3 * 2 * B * T * D * E)


def causal_attention(q, k, v):
    """Softmax attention of (B, T, H, D) queries, keys and values; each token sees those before."""
    T, D = q.shape[1], q.shape[-1]
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    seen = jnp.tril(jnp.ones((T, T), bool))
    probabilities = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", probabilities, v)


@row(smoke=[(2, 5, 2, 3)], small=[(2, 128, 4, 64)],
     full=[(4, 1024, 8, 64), (4, 256, 8, 64), (32, 64, 4, 64)])
def attention(draw, B, T, H, D):
    qkv = [draw.normal(B, T, H, D) for _ in range(3)]
    return operation(causal_attention, qkv, flops=6 * 2 * B * H * T * T * D)
