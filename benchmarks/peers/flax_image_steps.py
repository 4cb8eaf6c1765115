"""Flax's steps on images."""

from __future__ import annotations

import math

import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.peers import VIT_HEADS
from benchmarks.peers.adam_steps import trained, trained_epoch
from benchmarks.peers.flax_layers import MLP, Block, blocks, classified, dense, mlp, norm, sizes


def mlp_step(params, batch):
    return trained(classified(MLP(sizes(params))), mlp(params), batch)


def mlp_epoch(params, batches):
    return trained_epoch(classified(MLP(sizes(params))), mlp(params), batches)


class Convnet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for channels in (32, 64):
            x = nn.relu(nn.Conv(channels, (3, 3), use_bias=False)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return MLP((128, 10))(x.reshape(len(x), -1))


def _convnet_params(params):
    kernels, layers = params
    return {f"Conv_{i}": dense(w) for i, w in enumerate(kernels)} | {"MLP_0": mlp(layers)}


def convnet_step(params, batch):
    return trained(classified(Convnet()), _convnet_params(params), batch)


def convnet_epoch(params, batches):
    return trained_epoch(classified(Convnet()), _convnet_params(params), batches)


def _batch_norm(name):
    return nn.BatchNorm(use_running_average=False, name=name)


class ResidualBlock(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x):
        wider = self.channels != x.shape[-1]
        stride = 2 if wider else 1
        y = nn.Conv(self.channels, (3, 3), stride, use_bias=False, name="conv1")(x)
        y = nn.relu(_batch_norm("norm1")(y))
        y = nn.Conv(self.channels, (3, 3), use_bias=False, name="conv2")(y)
        y = _batch_norm("norm2")(y)
        if wider:
            x = nn.Conv(self.channels, (1, 1), stride, use_bias=False, name="project")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    channels: tuple

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.channels[0], (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(_batch_norm("norm")(x))
        for i, channels in enumerate(self.channels):
            x = ResidualBlock(channels, name=f"block{i}")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def _residual_block(p):
    kernels = {name: dense(p[name]) for name in ("conv1", "conv2", "project") if name in p}
    return kernels | {name: norm(*p[name]) for name in ("norm1", "norm2")}


def resnet_step(params, batch):
    model = ResNet(tuple(p["conv2"].shape[-1] for p in params["blocks"]))
    tree = {f"block{i}": _residual_block(p) for i, p in enumerate(params["blocks"])}
    tree |= {"stem": dense(params["stem"]), "norm": norm(*params["norm"]),
             "head": dense(*params["head"][0])}

    def loss(params, x, labels):
        # Ours keeps no running statistics: those that Flax computes are left to the compiler.
        logits, _ = model.apply({"params": params}, x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return trained(loss, tree, batch)


class ViT(nn.Module):
    patch: int
    features: int
    layers: int

    @nn.compact
    def __call__(self, x):
        patch = (self.patch, self.patch)
        x = nn.Conv(self.features, patch, patch, use_bias=False, name="patches")(x)
        x = x.reshape(len(x), -1, self.features)
        x = x + self.param("positions", nn.initializers.zeros, x.shape[1:])
        for i in range(self.layers):
            x = Block(VIT_HEADS[self.features], causal=False, name=f"block{i}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(1e-5, name="norm")(x).mean(1))


def vit_step(params, batch):
    pixels, D = params["patches"].shape
    patch = math.isqrt(pixels // 3)
    tree = {"patches": dense(params["patches"].reshape(patch, patch, 3, D)),
            "positions": params["positions"], "norm": norm(*params["norm"]),
            "head": dense(*params["head"][0]), **blocks(params["blocks"])}
    return trained(classified(ViT(patch, D, len(params["blocks"]))), tree, batch)


def vae_step(params, batch):
    encoder, decoder = (MLP(sizes(layers)) for layers in params)

    def loss(params, x, noise):
        mean, log_variance = jnp.split(encoder.apply({"params": params[0]}, x), 2, axis=-1)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        logits = decoder.apply({"params": params[1]}, z)
        pixels = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
        divergence = 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(-1)
        return (pixels + divergence).mean()

    return trained(loss, tuple(map(mlp, params)), batch)


resnet_network = resnet_step
