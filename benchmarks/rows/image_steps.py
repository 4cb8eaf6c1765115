"""Training steps on images: a convnet, a residual network with batch norm, a ViT, a VAE."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.row import row
from benchmarks.rows.convolution import convolution
from benchmarks.rows.elementwise import batch_normalised, normalised
from benchmarks.rows.pooling import max_pool
from benchmarks.rows.sequence_steps import transformer_block, transformer_params
from benchmarks.rows.steps import classification, dense_layers, mlp, training_epoch, training_step


def convnet_params(draw, H, C):
    """Two convolutions of 32 and 64 channels, dense layers of 128 and 10."""
    kernels = [draw.weight(3, 3, C, 32), draw.weight(3, 3, 32, 64)]
    return kernels, dense_layers(draw, (H // 4) ** 2 * 64, 128, 10)


def convnet(params, x):
    """Logits of NHWC images: twice convolution, ReLU, 2x2 max pool; then dense layers."""
    kernels, layers = params
    for w in kernels:
        x = max_pool(jax.nn.relu(convolution(x, w)), 2, 2)
    return mlp(layers, x.reshape(len(x), -1))


def _convnet_flops(H, C):
    pixels, small = H * H, (H // 2) ** 2
    dense = (H // 4) ** 2 * 64 * 128 + 1280
    return 6 * (pixels * 9 * C * 32 + small * 9 * 32 * 64 + dense)


@row("step", smoke=[(2, 8, 1)], small=[(16, 28, 1)], full=[(64, 28, 1), (64, 32, 3)])
def convnet_step(draw, B, H, C):
    batch = draw.normal(B, H, H, C), draw.integers(10, B)
    return training_step(classification(convnet), convnet_params(draw, H, C), batch,
                         flops=B * _convnet_flops(H, C))


@row("step", smoke=[(2, 2, 8, 1)], small=[(2, 8, 28, 1)], full=[(4, 64, 28, 1), (4, 64, 32, 3)])
def convnet_epoch(draw, K, B, H, C):
    batches = draw.normal(K, B, H, H, C), draw.integers(10, K, B)
    return training_epoch(classification(convnet), convnet_params(draw, H, C), batches,
                          flops=K * B * _convnet_flops(H, C))


def _norm_params(C):
    return jnp.ones(C), jnp.zeros(C)


def resnet_params(draw, blocks, width):
    """He et al. 2016 (arXiv:1512.03385), section 4.2: three stages of width, 2x and 4x channels."""
    stages, C = [], width
    for D in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            block = {"conv1": draw.weight(3, 3, C, D), "norm1": _norm_params(D),
                     "conv2": draw.weight(3, 3, D, D), "norm2": _norm_params(D)}
            stages.append(block | ({"project": draw.weight(1, 1, C, D)} if C != D else {}))
            C = D
    return {"stem": draw.weight(3, 3, 3, width), "norm": _norm_params(width), "blocks": stages,
            "head": dense_layers(draw, C, 10)}


def resnet(params, x):
    """Logits of NHWC images; batch norm by the batch's statistics."""
    x = jax.nn.relu(batch_normalised(convolution(x, params["stem"]), *params["norm"]))
    for p in params["blocks"]:
        stride = 2 if "project" in p else 1
        y = batch_normalised(convolution(x, p["conv1"], stride), *p["norm1"])
        y = batch_normalised(convolution(jax.nn.relu(y), p["conv2"]), *p["norm2"])
        x = convolution(x, p["project"], stride) if "project" in p else x
        x = jax.nn.relu(x + y)
    return mlp(params["head"], x.mean((1, 2)))


@row("step", smoke=[(2, 8, 1, 4)], small=[(8, 16, 1, 16)], full=[(32, 32, 3, 16)])
def resnet_step(draw, B, H, blocks, width):
    batch = draw.normal(B, H, H, 3), draw.integers(10, B)
    # Rounding passes through one normalisation per convolution: 1e-4 after twenty of them.
    return training_step(classification(resnet), resnet_params(draw, blocks, width), batch,
                         tolerance=1e-3)


def vit_params(draw, H, patch, layers, D):
    """Patch projection, positions, transformer blocks, final norm, head."""
    return {"patches": draw.weight(patch * patch * 3, D),
            "positions": draw.normal((H // patch) ** 2, D, scale=0.02),
            "blocks": [transformer_params(draw, D) for _ in range(layers)],
            "norm": (jnp.ones(D), jnp.zeros(D)), "head": dense_layers(draw, D, 10)}


def vit(params, x, patch, heads):
    """Dosovitskiy et al. 2021 (arXiv:2010.11929) with mean pooling in place of a class token."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // patch, patch, W // patch, patch, C).swapaxes(2, 3)
    x = x.reshape(B, -1, patch * patch * C) @ params["patches"] + params["positions"]
    for block in params["blocks"]:
        x = transformer_block(block, x, heads, causal=False)
    return mlp(params["head"], normalised(x, *params["norm"]).mean(1))


@row("step", smoke=[(2, 8, 4, 1, 8, 2)], small=[(8, 32, 4, 2, 64, 4)],
     full=[(32, 32, 4, 4, 192, 6)])
def vit_step(draw, B, H, patch, L, D, heads):
    loss = classification(lambda params, x: vit(params, x, patch, heads))
    batch = draw.normal(B, H, H, 3), draw.integers(10, B)
    return training_step(loss, vit_params(draw, H, patch, L, D), batch)


def vae_loss(params, x, noise):
    """Negative evidence bound, Kingma and Welling 2014 (arXiv:1312.6114), Bernoulli pixels."""
    encoder, decoder = params
    mean, log_variance = jnp.split(mlp(encoder, x), 2, axis=-1)
    logits = mlp(decoder, mean + jnp.exp(0.5 * log_variance) * noise)
    pixels = jnp.sum(jax.nn.softplus(logits) - x * logits, axis=-1)
    divergence = 0.5 * jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1)
    return jnp.mean(pixels + divergence)


@row("step", smoke=[(3, 20, 7, 2)], small=[(128, 784, 400, 20)], full=[(128, 784, 400, 20)])
def vae_step(draw, B, D, hidden, Z):
    params = dense_layers(draw, D, hidden, 2 * Z), dense_layers(draw, Z, hidden, D)
    batch = jax.nn.sigmoid(draw.normal(B, D)), draw.normal(B, Z)
    return training_step(vae_loss, params, batch)
