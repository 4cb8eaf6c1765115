"""PyTorch through `torch.compile`: the eager steps, forward and backward compiled."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn
from torch.func import grad, vmap

from benchmarks.peers import step
from benchmarks.peers.torch_layers import mlp, tensor, trained


def __getattr__(row):
    """Any other row that PyTorch has."""
    if not (eager := step("torch", row)):
        raise AttributeError(f"PyTorch has no version of {row}")
    return functools.partial(eager, wrap=torch.compile)


def physics_informed_step(params, batch):
    """By `torch.func`: where it meets `torch.autograd.grad`, PyTorch 2.13 compiles nothing."""
    def loss(model, points):
        def u(t, x):
            return model(torch.stack([t, x]))[0]

        def residual(point):
            t, x = point.unbind()
            u_t, u_x = grad(u, (0, 1))(t, x)
            u_xx = grad(grad(u, 1), 1)(t, x)
            return u_t + u(t, x) * u_x - 0.01 / math.pi * u_xx

        return vmap(residual)(points).square().mean()

    return trained(mlp(params, nn.Tanh), map(tensor, batch), loss, torch.compile)
