"""Dropout: `fbprop.ops.dropout` against plain code under `jax.grad`, both by the same key."""

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.row import operation, row

RATE = 0.1


def plain(x, key):
    """Dropout as it is mostly written."""
    return jnp.where(jax.random.bernoulli(key, 1 - RATE, x.shape), x / (1 - RATE), 0)


def ours(x, key):
    return fbprop.ops.dropout(x, RATE, key)


@row(smoke=[(3, 5)], small=[(512, 512)], full=[(4096, 2048), (512, 1024)])
def ops_dropout(draw, B, D):
    return operation(plain, [draw.normal(B, D)], [jax.random.PRNGKey(0)], ours=ours)


@row(smoke=[(3, 2, 5)], small=[(4, 64, 128)], full=[(4, 1024, 512), (12, 512, 256)])
def ops_dropout_in_scan(draw, L, B, D):
    """Layers x + dropout(gelu(x W)), in one scan over their stacked weights and keys."""
    def network(drop):
        def layer(x, each):
            weight, key = each
            return x + drop(jax.nn.gelu(x @ weight), key), None

        return lambda weights, x, keys: jax.lax.scan(layer, x, (weights, keys))[0]

    inputs = draw.weight(L, D, D) * L**0.5, draw.normal(B, D)
    keys = jax.random.split(jax.random.PRNGKey(0), L)
    return operation(network(plain), inputs, [keys], ours=network(ours), tolerance=1e-4,
                     flops=3 * 2 * L * B * D * D)
