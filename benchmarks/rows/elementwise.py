"""Activations, normalisations, reductions and losses: bound by memory, not arithmetic."""

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.row import loss_gradient, operation, row

MATRICES = {"smoke": [(3, 5)], "small": [(512, 1024)], "full": [(4096, 2048), (512, 1024)]}


def _passes(x):
    """Bytes that any formulation moves: x in, y out, its cotangent in, that of x out."""
    return 4 * x.nbytes


@row(**MATRICES)
def gelu(draw, B, D):
    x = draw.normal(B, D)
    return operation(lambda x: jax.nn.gelu(x, approximate=False), [x], bytes=_passes(x))


@row(**MATRICES)
def gelu_tanh(draw, B, D):
    x = draw.normal(B, D)
    return operation(jax.nn.gelu, [x], bytes=_passes(x))


@row(**MATRICES)
def silu(draw, B, D):
    x = draw.normal(B, D)
    return operation(jax.nn.silu, [x], bytes=_passes(x))


@row(smoke=[(3, 2, 5)], small=[(8, 64, 128)], full=[(12, 512, 512)])
def gated_layers(draw, L, B, D):
    """Gated layers, silu(x W) · (x V), in one scan over their stacked weights: what is kept."""
    weights, x = draw.weight(2, L, D, D), draw.normal(B, D)

    def network(weights, x):
        return jax.lax.scan(lambda x, w: (x + jax.nn.silu(x @ w[0]) * (x @ w[1]), None), x,
                            weights.swapaxes(0, 1))[0]

    return operation(network, [weights, x], tolerance=1e-4, flops=3 * 2 * L * 2 * B * D * D)


@row(smoke=[(3, 2, 5)], small=[(8, 64, 128)], full=[(12, 512, 512)])
def gelu_layers(draw, L, B, D):
    """Layers gelu(x W), by tanh as in GPT-2, in one scan over their stacked weights."""
    weights, x = draw.weight(L, D, D) * L**0.5, draw.normal(B, D)

    def network(weights, x):
        return jax.lax.scan(lambda x, w: (x + jax.nn.gelu(x @ w), None), x, weights)[0]

    return operation(network, [weights, x], tolerance=1e-4, flops=3 * 2 * L * B * D * D)


@row(**MATRICES)
def softplus(draw, B, D):
    x = draw.normal(B, D)
    return operation(jax.nn.softplus, [x], bytes=_passes(x))


@row(**MATRICES)
def softmax(draw, B, D):
    x = draw.normal(B, D)
    return operation(jax.nn.softmax, [x], bytes=_passes(x))


@row(**MATRICES)
def log_softmax(draw, B, D):
    x = draw.normal(B, D)
    return operation(jax.nn.log_softmax, [x], bytes=_passes(x))


@row(**MATRICES)
def where(draw, B, D):
    x, y, condition = draw.normal(B, D), draw.normal(B, D), draw.normal(B, D) > 0
    return operation(lambda x, y: jnp.where(condition, x, y), [x, y], bytes=6 * x.nbytes)


@row(**MATRICES)
def cumsum(draw, B, D):
    x = draw.normal(B, D)
    return operation(lambda x: jnp.cumsum(x, axis=1), [x], bytes=_passes(x))


@row(smoke=[(3, 5)], small=[(64, 512)], full=[(512, 2048)])
def sort(draw, B, D):
    x = draw.normal(B, D)
    return operation(lambda x: jnp.sort(x, axis=1), [x], bytes=_passes(x))


@row(**MATRICES)
def logsumexp(draw, B, D):
    x = draw.normal(B, D)
    return operation(lambda x: jax.nn.logsumexp(x, axis=1), [x], bytes=2 * x.nbytes)


@row(**MATRICES)
def norm(draw, B, D):
    x = draw.normal(B, D)
    return operation(lambda x: jnp.linalg.norm(x, axis=1), [x], bytes=2 * x.nbytes)


@row(**MATRICES)
def var(draw, B, D):
    x = draw.normal(B, D)
    return operation(lambda x: jnp.var(x, axis=1), [x], bytes=2 * x.nbytes)


@row(smoke=[(3, 5)], small=[(512, 512)], full=[(4096, 512), (8192, 768), (512, 256)])
def layer_norm(draw, B, D):
    x, scale, bias = draw.normal(B, D), draw.normal(D), draw.normal(D)
    return operation(normalised, [x, scale, bias], bytes=_passes(x))


@row(smoke=[(3, 5)], small=[(512, 512)], full=[(4096, 512), (8192, 768), (512, 256)])
def standardize(draw, B, D):
    x = draw.normal(B, D)
    return operation(jax.nn.standardize, [x], bytes=_passes(x))


def normalised(x, scale, bias, epsilon=1e-5):
    """Layer norm over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * scale + bias


def batch_normalised(x, scale, bias, epsilon=1e-5):
    """Batch norm of NHWC images by the batch's own statistics."""
    mean = jnp.mean(x, axis=(0, 1, 2))
    variance = jnp.var(x, axis=(0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * scale + bias


@row(smoke=[(3, 5)], small=[(512, 512)], full=[(4096, 512), (8192, 768), (512, 256)])
def layer_norm_operation(draw, B, D):
    x, scale, bias = draw.normal(B, D), draw.normal(D), draw.normal(D)
    return operation(normalised, [x, scale, bias], ours=fbprop.ops.layer_norm, bytes=_passes(x))


@row(smoke=[(2, 4, 4, 3)], small=[(16, 16, 16, 64)],
     full=[(64, 32, 32, 64), (64, 16, 16, 128), (32, 8, 8, 32)])
def batch_norm_operation(draw, B, H, W, C):
    x, scale, bias = draw.normal(B, H, W, C), draw.normal(C), draw.normal(C)
    return operation(batch_normalised, [x, scale, bias],
                     ours=lambda *x: fbprop.ops.batch_norm(*x)[0], bytes=_passes(x))


@row(smoke=[(2, 4, 4, 3)], small=[(16, 16, 16, 64)],
     full=[(64, 32, 32, 64), (64, 16, 16, 128), (32, 8, 8, 32)])
def batch_norm(draw, B, H, W, C):
    x, scale, bias = draw.normal(B, H, W, C), draw.normal(C), draw.normal(C)
    return operation(batch_normalised, [x, scale, bias], bytes=_passes(x))


def cross_entropy(logits, labels):
    """Mean negative log-probability of the labels, over all leading axes."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -jnp.mean(chosen)


@row(smoke=[(5, 7)], small=[(512, 1000)], full=[(4096, 1000), (4096, 8192)])
def softmax_cross_entropy(draw, N, V):
    logits, labels = draw.normal(N, V), draw.integers(V, N)
    return loss_gradient(cross_entropy, logits, [labels], bytes=2 * logits.nbytes)
