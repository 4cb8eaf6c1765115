"""What PyTorch's steps share: layers with our weights, and the step, eager with its fused Adam.

As many threads as the process may use. Layouts are PyTorch's own (NCHW images, output x input
matrices), as its users have them.
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


def tensor(x):
    x = np.array(x)
    return torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x)


def numbers(x):
    """A tensor as an array."""
    return x.detach().cpu().numpy()


def trained(model, batch, loss, wrap=eager):
    """A function that does one step on ``loss(model, *batch)`` and returns the loss before it."""
    step, batch = _step(model, loss, wrap), [x.to(DEVICE) for x in batch]
    return lambda: float(step(*batch))


def trained_epoch(model, batches, loss, wrap=eager):
    """A loop of steps over the leading axis of the batches; the loss before the first one."""
    step, batches = _step(model, loss, wrap), list(zip(*(x.to(DEVICE) for x in batches)))

    def run():
        losses = [step(*batch) for batch in batches]
        return torch.stack(losses).tolist()[0]  # one transfer, as ours: it waits for every step

    return run


def _step(model, loss, wrap):
    model = model.to(DEVICE)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    forward = wrap(lambda *batch: loss(model, *batch))

    def step(*batch):
        adam.zero_grad(set_to_none=True)
        value = forward(*batch)
        value.backward()
        adam.step()
        return value.detach()

    return step


def classified(model, x, labels):
    return F.cross_entropy(model(x), labels)


def dense(weight, bias=None):
    layer = nn.Linear(*weight.shape, bias=bias is not None)
    layer.weight.data = tensor(weight).T.contiguous()
    if bias is not None:
        layer.bias.data = tensor(bias)
    return layer


def mlp(params, activation=nn.ReLU):
    layers = [part for p in params for part in (dense(*p), activation())]
    return nn.Sequential(*layers[:-1])


def mlp_gradient(model):
    """Gradients of `mlp`'s layers, as our parameters are."""
    return [(numbers(layer.weight.grad).T, numbers(layer.bias.grad))
            for layer in model if isinstance(layer, nn.Linear)]


def embedding(table):
    return nn.Embedding.from_pretrained(tensor(table), freeze=False)


def layer_norm(scale, bias):
    layer = nn.LayerNorm(len(scale))
    layer.weight.data, layer.bias.data = tensor(scale), tensor(bias)
    return layer


class Block(nn.Module):
    """Pre-norm transformer block of (B, T, D)."""

    def __init__(self, p, heads, causal=True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList(layer_norm(*n) for n in p["norms"])
        self.qkv, self.out = dense(p["qkv"]), dense(p["out"])
        self.up, self.down = dense(*p["up"]), dense(*p["down"])

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in self.qkv(self.norms[0](x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))
