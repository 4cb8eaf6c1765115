"""Training steps of networks that only accelerators train; `gpt2_124m_step` is another.

They compute in bfloat16, with parameters and moments in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.row import row
from benchmarks.rows.convolution import convolution
from benchmarks.rows.elementwise import batch_normalised
from benchmarks.rows.image_steps import vit, vit_params
from benchmarks.rows.pooling import max_pool
from benchmarks.rows.steps import classification, dense_layers, mlp, training_step

STAGES = 3, 4, 6, 3  # blocks of ResNet-50
BF16 = {"tolerance": 0.1}  # it has 8 bits, and sixteen blocks add their rounding up


def bottleneck_params(draw, stages, width, classes):
    """He et al. 2016 (arXiv:1512.03385), table 1: stages of 1x1, 3x3 and 1x1 kernels."""
    norm = lambda C: (jnp.ones(C), jnp.zeros(C))
    blocks, C = [], width
    for stage, count in enumerate(stages):
        D = width * 2**stage
        for number in range(count):
            block = {"kernels": [draw.weight(1, 1, C, D), draw.weight(3, 3, D, D),
                                 draw.weight(1, 1, D, 4 * D)],
                     "norms": [norm(D), norm(D), norm(4 * D)]}
            if number == 0:
                block["project"] = draw.weight(1, 1, C, 4 * D), norm(4 * D)
            blocks, C = [*blocks, block], 4 * D
    return {"stem": (draw.weight(7, 7, 3, width), norm(width)), "blocks": blocks,
            "head": dense_layers(draw, C, classes)}


def convolved(x, kernel, norm, stride=1):
    """A convolution and batch norm, whose statistics are in float32."""
    y = convolution(x, kernel, stride).astype(jnp.float32)
    return batch_normalised(y, *norm).astype(x.dtype)


def bottleneck_resnet(params, x):
    """Logits of NHWC images; kernels in the images' type."""
    cast = lambda kernel: kernel.astype(x.dtype)
    kernel, norm = params["stem"]
    x = jax.nn.relu(convolved(x, cast(kernel), norm, 2))
    x = max_pool(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))), 3, 2)  # nothing is below 0 here
    for number, p in enumerate(params["blocks"]):
        stride = 2 if number and "project" in p else 1
        y = x
        for i, (kernel, norm) in enumerate(zip(p["kernels"], p["norms"])):
            y = convolved(y if i == 0 else jax.nn.relu(y), cast(kernel), norm,
                          stride if i == 1 else 1)
        if "project" in p:
            kernel, norm = p["project"]
            x = convolved(x, cast(kernel), norm, stride)
        x = jax.nn.relu(x + y)
    return mlp(params["head"], x.mean((1, 2)).astype(jnp.float32))


@row("step", accelerator=True, full=[(64, 224, 64)])
def resnet50_step(draw, B, H, width):
    """25.6 million parameters; 4.1e9 products forward of an image of 224 x 224."""
    params = bottleneck_params(draw, STAGES, width, 1000)
    batch = draw.normal(B, H, H, 3), draw.integers(1000, B)
    loss = classification(lambda params, x: bottleneck_resnet(params, x.astype(jnp.bfloat16)))
    return training_step(loss, params, batch, flops=B * 6 * 4.1e9, **BF16)


@row("step", accelerator=True, full=[(64, 224, 16, 12, 768, 12)])
def vit_b_step(draw, B, H, patch, L, D, heads):
    """86 million parameters (Dosovitskiy et al. 2021, table 1)."""
    def apply(params, x):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return vit(params, x.astype(jnp.bfloat16), patch, heads).astype(jnp.float32)

    T = (H // patch) ** 2
    batch = draw.normal(B, H, H, 3), draw.integers(10, B)
    return training_step(classification(apply), vit_params(draw, H, patch, L, D), batch,
                         flops=B * T * (72 * L * D * D + 12 * L * T * D), **BF16)
