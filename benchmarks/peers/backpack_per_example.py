"""BackPACK's squared norms per example, from one backward pass."""

from __future__ import annotations

from backpack import backpack, extend
from backpack.extensions import BatchL2Grad
from torch import nn

from benchmarks.peers.torch_image_steps import convnet_batch, convolution_of
from benchmarks.peers.torch_layers import mlp, numbers, tensor


def mlp_norms(params, batch):
    return _norms(mlp(params), [*map(tensor, batch)])


def convnet_norms(params, batch):
    """Of modules alone, as BackPACK has it: the dense layer reads channels first."""
    kernels, ((w, b), *layers) = params
    channels = kernels[-1].shape[-1]
    side = round((len(w) / channels) ** 0.5)
    w = w.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(w.shape)
    parts = [part for kernel in kernels for part in (
        convolution_of(kernel, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    model = nn.Sequential(*parts, nn.Flatten(), *mlp([(w, b), *layers]))
    return _norms(model, convnet_batch(batch))


def _norms(model, batch):
    x, labels = batch
    model, loss = extend(model), extend(nn.CrossEntropyLoss())

    def run():
        model.zero_grad(set_to_none=True)
        value = loss(model(x), labels)
        with backpack(BatchL2Grad()):
            value.backward()
        squares = sum(p.batch_l2 for p in model.parameters())
        return len(x) * numbers(squares.sqrt())  # those of the mean's gradients, before

    return run
