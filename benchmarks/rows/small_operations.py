"""The smaller operations of `fbprop.ops` against plain code under `jax.grad`, as networks use them.

Norms, activations and gates behind a dense layer's product, losses as a mean over rows.
"""

import jax
import jax.numpy as jnp

from benchmarks.row import loss_gradient, operation, row
from fbprop import ops

WIDE = {"smoke": [(3, 4)], "small": [(512, 256)], "full": [(4096, 1024)]}


def _rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale


@row(**WIDE)
def ops_rms_norm(draw, B, D):
    return operation(_rms_norm, [draw.normal(B, D), draw.normal(D)], ours=ops.rms_norm)


def _group_norm(x, scale, bias, groups=4):
    h = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean = jnp.mean(h, (1, 3), keepdims=True)
    var = jnp.mean(jnp.square(h - mean), (1, 3), keepdims=True)
    return ((h - mean) * jax.lax.rsqrt(var + 1e-5)).reshape(x.shape) * scale + bias


@row(smoke=[(2, 3, 4)], small=[(8, 16, 32)], full=[(32, 32, 64)])
def ops_group_norm(draw, B, H, C):
    inputs = [draw.normal(B, H, H, C), draw.normal(C), draw.normal(C)]
    return operation(_group_norm, inputs, ours=lambda *x: ops.group_norm(*x, groups=4))


def _activated(draw, B, D, plain, ours, inputs=1):
    """An activation between two products, whose operands are kept anyhow."""
    x, w = draw.normal(B, D), draw.weight(D, inputs * D)

    def layers(activation):
        return lambda x, w, v: activation(*jnp.split(x @ w, inputs, -1)) @ v

    return operation(layers(plain), [x, w, draw.weight(D, D)], ours=layers(ours))


@row(**WIDE)
def ops_gelu(draw, B, D):
    return _activated(draw, B, D, jax.nn.gelu, ops.gelu)


@row(**WIDE)
def ops_silu(draw, B, D):
    return _activated(draw, B, D, jax.nn.silu, ops.silu)


@row(**WIDE)
def ops_swiglu(draw, B, D):
    return _activated(draw, B, D, lambda g, x: jax.nn.silu(g) * x, ops.swiglu, 2)


@row(**WIDE)
def ops_geglu(draw, B, D):
    return _activated(draw, B, D, lambda g, x: jax.nn.gelu(g) * x, ops.geglu, 2)


@row(**WIDE)
def ops_dense(draw, B, D):
    inputs = [draw.normal(B, D), draw.weight(D, D), draw.normal(D)]
    plain = lambda x, w, b: jax.nn.gelu(x @ w + b, approximate=False)
    return operation(plain, inputs, ours=lambda *x: ops.dense(*x, activation="gelu"))


def _softmax_cross_entropy(logits, labels):
    """Optax's formulas."""
    if labels.ndim == logits.ndim:
        return -jnp.sum(labels * jax.nn.log_softmax(logits), -1)
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _loss(draw, B, D, plain, ours, targets):
    mean = lambda loss: lambda predictions, targets: jnp.mean(loss(predictions, targets))
    return loss_gradient(mean(plain), draw.normal(B, D), [targets], ours=mean(ours))


@row(**WIDE)
def ops_softmax_cross_entropy(draw, B, D):
    targets = draw.integers(D, B)
    return _loss(draw, B, D, _softmax_cross_entropy, ops.softmax_cross_entropy, targets)


@row(**WIDE)
def ops_soft_labels(draw, B, D):
    targets = jax.nn.softmax(draw.normal(B, D))
    return _loss(draw, B, D, _softmax_cross_entropy, ops.softmax_cross_entropy, targets)


def _sigmoid_cross_entropy(z, y):
    return -y * jax.nn.log_sigmoid(z) - (1 - y) * jax.nn.log_sigmoid(-z)


@row(**WIDE)
def ops_sigmoid_cross_entropy(draw, B, D):
    targets = draw.integers(2, B, D).astype(jnp.float32)
    return _loss(draw, B, D, _sigmoid_cross_entropy, ops.sigmoid_cross_entropy, targets)


def _huber(predictions, targets):
    """Optax's formula."""
    error = jnp.abs(predictions - targets)
    quadratic = jnp.minimum(error, 1.0)
    return 0.5 * quadratic**2 + (error - quadratic)


@row(**WIDE)
def ops_huber(draw, B, D):
    return _loss(draw, B, D, _huber, ops.huber, draw.normal(B, D))


def _rotary(x):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@row(smoke=[(2, 3, 2, 4)], small=[(4, 64, 4, 16)], full=[(8, 1024, 8, 64)])
def ops_rotary(draw, B, T, H, D):
    return operation(_rotary, [draw.normal(B, T, H, D)], ours=ops.rotary)
