"""PyTorch, eager, with its fused Adam and as many threads as the process may use.

Networks are modules whose weights are copied from ours; layouts are PyTorch's own (NCHW images,
output x input matrices), as its users have them.
"""

from __future__ import annotations

import os

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(len(os.sched_getaffinity(0)))
ON_GPU = jax.default_backend() == "gpu"
if ON_GPU and not torch.cuda.is_available():
    raise ImportError("this PyTorch has no CUDA")
DEVICE = "cuda" if ON_GPU else "cpu"


def eager(forward):
    """As it is; `torch_compiled_steps` has `torch.compile` in its place."""
    return forward


def _tensor(x):
    x = np.array(x)
    return torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x)


def _dense(weight, bias=None):
    layer = nn.Linear(*weight.shape, bias=bias is not None)
    layer.weight.data = _tensor(weight).T.contiguous()
    if bias is not None:
        layer.bias.data = _tensor(bias)
    return layer


def _trained(model, batch, loss, wrap=eager):
    model, batch = model.to(DEVICE), [x.to(DEVICE) for x in batch]
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    forward = wrap(lambda *batch: loss(model, *batch))

    def run():
        adam.zero_grad(set_to_none=True)
        value = forward(*batch)
        value.backward()
        adam.step()
        return float(value.detach())

    return run


def _classified(model, x, labels):
    return F.cross_entropy(model(x), labels)


def _mlp(params):
    layers = [part for p in params for part in (_dense(*p), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def mlp_step(params, batch, wrap=eager):
    return _trained(_mlp(params), [_tensor(x) for x in batch], _classified, wrap)


def _convolution(kernel):
    layer = nn.Conv2d(*kernel.shape[2:], 3, padding="same", bias=False)
    layer.weight.data = _tensor(kernel).permute(3, 2, 0, 1).contiguous()
    return layer


class Convnet(nn.Module):
    def __init__(self, params):
        super().__init__()
        kernels, dense = params
        self.convolutions = nn.ModuleList(_convolution(w) for w in kernels)
        self.dense = _mlp(dense)

    def forward(self, x):
        for layer in self.convolutions:
            x = F.max_pool2d(F.relu(layer(x)), 2)
        return self.dense(x.permute(0, 2, 3, 1).flatten(1))  # our flattening is of NHWC


def convnet_step(params, batch, wrap=eager):
    x, labels = map(_tensor, batch)
    images = x.permute(0, 3, 1, 2).contiguous()
    return _trained(Convnet(params), [images, labels], _classified, wrap)


class CharacterModel(nn.Module):
    """Embedding, LSTM, dense layer; nn.LSTM has our gate order and a second bias, left at zero."""

    def __init__(self, params):
        super().__init__()
        w, u, b = map(_tensor, params["cell"])
        self.embedding = nn.Embedding.from_pretrained(_tensor(params["embedding"]), freeze=False)
        self.cell = nn.LSTM(len(w), len(u))
        zeros = torch.zeros_like(b)
        for name, value in zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"),
                               (w.T.contiguous(), u.T.contiguous(), b, zeros)):
            getattr(self.cell, name).data = value
        self.head = _dense(*params["head"][0])

    def forward(self, tokens):
        return self.head(self.cell(self.embedding(tokens))[0])


def lstm_character_step(params, batch, wrap=eager):
    def loss(model, tokens):
        return F.cross_entropy(model(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())

    return _trained(CharacterModel(params), [_tensor(batch[0])], loss, wrap)


def _norm(scale, bias):
    layer = nn.LayerNorm(len(scale))
    layer.weight.data, layer.bias.data = _tensor(scale), _tensor(bias)
    return layer


class Block(nn.Module):
    def __init__(self, p, heads):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(_norm(*n) for n in p["norms"])
        self.qkv, self.out = _dense(p["qkv"]), _dense(p["out"])
        self.up, self.down = _dense(*p["up"]), _dense(*p["down"])

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in self.qkv(self.norms[0](x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, params, heads):
        super().__init__()
        self.tokens = nn.Embedding.from_pretrained(_tensor(params["tokens"]), freeze=False)
        self.positions = nn.Parameter(_tensor(params["positions"]))
        self.blocks = nn.Sequential(*(Block(p, heads) for p in params["blocks"]))
        self.norm = _norm(*params["norm"])

    def forward(self, tokens):
        x = self.blocks(self.tokens(tokens) + self.positions)
        return self.norm(x) @ self.tokens.weight.T


def gpt_step(params, batch, wrap=eager):
    def loss(model, tokens):
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return _trained(GPT(params, heads=4), [_tensor(batch[0])], loss, wrap)
