"""jax-privacy's clipped sum: a gradient per example by `jax.vmap`, clipped and added up."""

from __future__ import annotations

import jax
from jax_privacy.clipping import clipped_grad

from benchmarks.rows.elementwise import cross_entropy
from benchmarks.rows.image_steps import convnet
from benchmarks.rows.per_example import BOUND
from benchmarks.rows.steps import mlp


def mlp_clipped(params, batch):
    return _clipped(mlp, params, batch)


def convnet_clipped(params, batch):
    return _clipped(convnet, params, batch)


def _clipped(apply, params, batch):
    def loss(params, x, labels):
        return cross_entropy(apply(params, x), labels)

    run = jax.jit(clipped_grad(loss, l2_clip_norm=BOUND, batch_argnums=(1, 2)))
    return lambda: jax.block_until_ready(run(params, *batch))
