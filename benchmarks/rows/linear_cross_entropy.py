"""A language model's head and loss: `fbprop.ops.linear_cross_entropy` against plain code."""

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.row import loss_gradient, row


def plain(params, labels):
    """Optax's loss by integer labels on x w, its formula where Optax is not installed."""
    logits = jnp.matmul(*params, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def ours(params, labels):
    return fbprop.ops.linear_cross_entropy(*params, labels)


def _row(draw, N, D, V, dtype, **figures):
    params = draw.normal(N, D, dtype=dtype), draw.weight(D, V, dtype=dtype)
    return loss_gradient(plain, params, [draw.integers(V, N)], ours=ours, flops=6 * N * D * V,
                         **figures)


@row(smoke=[(5, 3, 7)], small=[(1024, 64, 1000)], full=[(4096, 256, 8192), (2048, 256, 32000)])
def linear_cross_entropy(draw, N, D, V):
    return _row(draw, N, D, V, jnp.float32)


@row(accelerator=True, full=[(65536, 768, 50304)])
def linear_cross_entropy_16bit(draw, N, D, V):
    return _row(draw, N, D, V, jnp.bfloat16, tolerance=2e-2)
