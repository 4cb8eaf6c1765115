"""Opacus's ghost clipping: norms from one backward pass, the clipped sum from a second one."""

from __future__ import annotations

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch.nn import functional as F

from benchmarks.peers.torch_image_steps import Convnet, convnet_batch, convnet_gradient
from benchmarks.peers.torch_layers import mlp, mlp_gradient, numbers, tensor
from benchmarks.rows.per_example import BOUND


def mlp_norms(params, batch):
    return _norms(mlp(params), [*map(tensor, batch)])


def convnet_norms(params, batch):
    return _norms(Convnet(params), convnet_batch(batch))


def mlp_clipped(params, batch):
    return _clipped(mlp(params), [*map(tensor, batch)], mlp_gradient)


def convnet_clipped(params, batch):
    return _clipped(Convnet(params), convnet_batch(batch), convnet_gradient)


def _first(model, batch):
    """A function that makes the first pass; it returns the examples' losses."""
    x, labels = batch
    # Opacus 1.6 reads activations as if channels came first in memory too, and images of one
    # channel, whose strides leave it open, lead to channels last: norms of 0.
    x = x.clone(memory_format=torch.contiguous_format)
    ghost = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=BOUND, use_ghost_clipping=True, loss_reduction="mean")

    def run():
        losses = F.cross_entropy(ghost(x), labels, reduction="none")
        ghost.zero_grad(set_to_none=True)
        losses.mean().backward(retain_graph=True)
        return losses

    return ghost, run


def _norms(model, batch):
    ghost, first = _first(model, batch)

    def run():
        first()
        return numbers(ghost.get_norm_sample())

    return run


def _clipped(model, batch, gradient_of):
    ghost, first = _first(model, batch)

    def run():
        losses = first()
        ghost.zero_grad(set_to_none=True)
        ghost.disable_hooks()
        torch.sum(ghost.get_clipping_coef() * losses).backward()
        ghost.enable_hooks()
        return gradient_of(model)

    return run
