"""Equinox's steps on images, NCHW as its layers have them."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from benchmarks.peers import VIT_HEADS
from benchmarks.peers.adam_steps import trained, trained_epoch
from benchmarks.peers.equinox_layers import (
    KEY,
    MLP,
    Block,
    affine,
    classified,
    cross_entropy,
    dense,
    layer_norm,
    split,
)


def mlp_step(params, batch):
    return trained(*classified(MLP(params), lambda model, x: model(x)), batch)


def mlp_epoch(params, batches):
    return trained_epoch(*classified(MLP(params), lambda model, x: model(x)), batches)


def _channels_first(batch):
    images, labels = batch
    return jnp.moveaxis(images, -1, -3), labels


def _convolution(kernel, stride=1, padding="SAME"):
    H, _, D, E = kernel.shape
    layer = eqx.nn.Conv2d(D, E, H, stride, padding, use_bias=False, key=KEY)
    return eqx.tree_at(lambda m: m.weight, layer, kernel.transpose(3, 2, 0, 1))


class Convnet(eqx.Module):
    convolutions: list
    pool: eqx.nn.MaxPool2d
    dense: MLP

    def __init__(self, params):
        kernels, layers = params
        self.convolutions = [_convolution(w) for w in kernels]
        self.pool, self.dense = eqx.nn.MaxPool2d(2, 2), MLP(layers)

    def __call__(self, x):
        for layer in self.convolutions:
            x = self.pool(jax.nn.relu(layer(x)))
        return self.dense(x.transpose(1, 2, 0).ravel())  # our flattening is of HWC


def convnet_step(params, batch):
    loss, params = classified(Convnet(params), lambda model, x: model(x))
    return trained(loss, params, _channels_first(batch))


def convnet_epoch(params, batches):
    loss, params = classified(Convnet(params), lambda model, x: model(x))
    return trained_epoch(loss, params, _channels_first(batches))


def _batch_norm(scale, bias):
    layer = eqx.nn.BatchNorm(len(scale), axis_name="batch", mode="batch")
    return affine(layer, scale, bias)


class ResidualBlock(eqx.Module):
    convolutions: list
    norms: list
    project: eqx.nn.Conv2d | None

    def __init__(self, p):
        stride = 2 if "project" in p else 1
        self.convolutions = [_convolution(p["conv1"], stride), _convolution(p["conv2"])]
        self.norms = [_batch_norm(*p[name]) for name in ("norm1", "norm2")]
        self.project = _convolution(p["project"], stride) if "project" in p else None

    def __call__(self, x, state):
        y, state = self.norms[0](self.convolutions[0](x), state)
        y, state = self.norms[1](self.convolutions[1](jax.nn.relu(y)), state)
        return jax.nn.relu(y + (self.project(x) if self.project else x)), state


class ResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, params):
        self.stem, self.norm = _convolution(params["stem"]), _batch_norm(*params["norm"])
        self.blocks = [ResidualBlock(p) for p in params["blocks"]]
        self.head = dense(*params["head"][0])

    def __call__(self, x, state):
        x, state = self.norm(self.stem(x), state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean((1, 2))), state


def resnet_step(params, batch):
    model, state = eqx.nn.make_with_state(ResNet)(params)

    def loss(model, images, labels):
        apply = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        # Ours keeps no running statistics: those that Equinox computes are left to the compiler.
        return cross_entropy(apply(images, state)[0], labels)

    return trained(*split(model, loss), _channels_first(batch))


class ViT(eqx.Module):
    patches: eqx.nn.Conv2d
    positions: jax.Array
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, params):
        pixels, D = params["patches"].shape
        patch = math.isqrt(pixels // 3)
        kernel = params["patches"].reshape(patch, patch, 3, D)
        self.patches, self.positions = _convolution(kernel, patch, 0), params["positions"]
        self.blocks = [Block(p, VIT_HEADS[D], causal=False) for p in params["blocks"]]
        self.norm, self.head = layer_norm(*params["norm"]), dense(*params["head"][0])

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(len(x), -1).T + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(jax.vmap(self.norm)(x).mean(0))


def vit_step(params, batch):
    loss, params = classified(ViT(params), lambda model, x: model(x))
    return trained(loss, params, _channels_first(batch))


def vae_step(params, batch):
    def one(model, x, noise):
        encoder, decoder = model
        mean, log_variance = jnp.split(encoder(x), 2)
        logits = decoder(mean + jnp.exp(0.5 * log_variance) * noise)
        pixels = optax.sigmoid_binary_cross_entropy(logits, x).sum()
        return pixels + 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum()

    def loss(model, x, noise):
        return jax.vmap(lambda *each: one(model, *each))(x, noise).mean()

    return trained(*split(tuple(map(MLP, params)), loss), batch)
