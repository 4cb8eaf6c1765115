"""PyTorch's steps on sequences."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers.torch_layers import (
    DEVICE,
    Block,
    dense,
    eager,
    embedding,
    layer_norm,
    tensor,
    trained,
)


class CharacterModel(nn.Module):
    """Embedding, nn.LSTM or nn.GRU, dense layer.

    PyTorch's cells have our gate order and a second bias, here zero at first.
    """

    def __init__(self, params, cell):
        super().__init__()
        w, u, b = map(tensor, params["cell"])
        self.embedding = embedding(params["embedding"])
        self.cell = cell(len(w), len(u))
        zeros = torch.zeros_like(b)
        for name, value in zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"),
                               (w.T.contiguous(), u.T.contiguous(), b, zeros)):
            getattr(self.cell, name).data = value
        self.head = dense(*params["head"][0])

    def forward(self, tokens):
        return self.head(self.cell(self.embedding(tokens))[0])


def _character_step(cell, params, batch, wrap):
    def loss(model, tokens):
        return F.cross_entropy(model(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())

    return trained(CharacterModel(params, cell), [tensor(batch[0])], loss, wrap)


def lstm_character_step(params, batch, wrap=eager):
    return _character_step(nn.LSTM, params, batch, wrap)


def gru_character_step(params, batch, wrap=eager):
    return _character_step(nn.GRU, params, batch, wrap)


class GPT(nn.Module):
    def __init__(self, params, heads):
        super().__init__()
        self.tokens = embedding(params["tokens"])
        self.positions = nn.Parameter(tensor(params["positions"]))
        self.blocks = nn.Sequential(*(Block(p, heads) for p in params["blocks"]))
        self.norm = layer_norm(*params["norm"])

    def forward(self, tokens):
        x = self.blocks(self.tokens(tokens) + self.positions)
        return self.norm(x) @ self.tokens.weight.T


def gpt_step(params, batch, wrap=eager):
    def loss(model, tokens):
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return trained(GPT(params, heads=4), [tensor(batch[0])], loss, wrap)


def gpt2_124m_step(params, batch, wrap=eager, heads=12):
    """bfloat16 by autocast, float32 parameters and loss."""
    def loss(model, tokens):
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return trained(GPT(params, heads), [tensor(batch[0])], loss, wrap)
