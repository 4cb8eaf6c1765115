"""PyTorch's steps on images."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers import VIT_HEADS
from benchmarks.peers.torch_layers import (
    Block,
    classified,
    dense,
    eager,
    layer_norm,
    mlp,
    mlp_gradient,
    numbers,
    tensor,
    trained,
    trained_epoch,
)


def mlp_step(params, batch, wrap=eager):
    return trained(mlp(params), map(tensor, batch), classified, wrap)


def mlp_epoch(params, batches, wrap=eager):
    return trained_epoch(mlp(params), map(tensor, batches), classified, wrap)


def _images(x):
    """NCHW from NHWC, after any leading axes."""
    return tensor(x).movedim(-1, -3).contiguous()


def convolution_of(kernel, **options):
    H, _, D, E = kernel.shape
    layer = nn.Conv2d(D, E, H, bias=False, **options)
    layer.weight.data = tensor(kernel).permute(3, 2, 0, 1).contiguous()
    return layer


class Convnet(nn.Module):
    def __init__(self, params):
        super().__init__()
        kernels, layers = params
        self.convolutions = nn.ModuleList(convolution_of(w, padding="same") for w in kernels)
        self.dense = mlp(layers)

    def forward(self, x):
        for layer in self.convolutions:
            x = F.max_pool2d(F.relu(layer(x)), 2)
        return self.dense(x.permute(0, 2, 3, 1).flatten(1))  # our flattening is of NHWC


def convnet_batch(batch):
    x, labels = batch
    return [_images(x), tensor(labels)]


def convnet_gradient(model):
    """Gradients of `Convnet`, as our parameters are."""
    kernels = [numbers(layer.weight.grad).transpose(2, 3, 1, 0) for layer in model.convolutions]
    return kernels, mlp_gradient(model.dense)


def convnet_step(params, batch, wrap=eager):
    return trained(Convnet(params), convnet_batch(batch), classified, wrap)


def convnet_epoch(params, batches, wrap=eager):
    return trained_epoch(Convnet(params), convnet_batch(batches), classified, wrap)


def _batch_norm(scale, bias):
    layer = nn.BatchNorm2d(len(scale), track_running_stats=False)
    layer.weight.data, layer.bias.data = tensor(scale), tensor(bias)
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.norms = nn.ModuleList(_batch_norm(*p[n]) for n in ("norm1", "norm2"))
        self.last = convolution_of(p["conv2"], padding=1)
        self.project = None
        if "project" in p:
            self.project = convolution_of(p["project"], stride=2)
            # SAME at stride 2 pads the far side alone: padding=1 would be another network.
            self.first = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)),
                                       convolution_of(p["conv1"], stride=2))
        else:
            self.first = convolution_of(p["conv1"], padding=1)

    def forward(self, x):
        y = F.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.last(y))
        return F.relu(y + (self.project(x) if self.project else x))


class ResNet(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.stem = convolution_of(params["stem"], padding=1)
        self.norm = _batch_norm(*params["norm"])
        self.blocks = nn.Sequential(*map(ResidualBlock, params["blocks"]))
        self.head = dense(*params["head"][0])

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def resnet_step(params, batch, wrap=eager):
    x, labels = batch
    return trained(ResNet(params), [_images(x), tensor(labels)], classified, wrap)


class ViT(nn.Module):
    def __init__(self, params):
        super().__init__()
        pixels, D = params["patches"].shape
        patch = math.isqrt(pixels // 3)
        kernel = params["patches"].reshape(patch, patch, 3, D)
        self.patches = convolution_of(kernel, stride=patch)
        self.positions = nn.Parameter(tensor(params["positions"]))
        self.blocks = nn.Sequential(
            *(Block(p, VIT_HEADS[D], causal=False) for p in params["blocks"])
        )
        self.norm, self.head = layer_norm(*params["norm"]), dense(*params["head"][0])

    def forward(self, x):
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.positions)
        return self.head(self.norm(x).mean(1))


def vit_step(params, batch, wrap=eager):
    x, labels = batch
    return trained(ViT(params), [_images(x), tensor(labels)], classified, wrap)


def vae_step(params, batch, wrap=eager):
    def loss(model, x, noise):
        encoder, decoder = model
        mean, log_variance = encoder(x).chunk(2, -1)
        logits = decoder(mean + torch.exp(0.5 * log_variance) * noise)
        pixels = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        divergence = 0.5 * torch.sum(log_variance.exp() + mean**2 - 1 - log_variance)
        return (pixels + divergence) / len(x)

    return trained(nn.ModuleList(map(mlp, params)), map(tensor, batch), loss, wrap)
