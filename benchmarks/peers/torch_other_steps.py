"""PyTorch's steps of word embeddings, a graph network, a physics-informed network."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.autograd import grad
from torch.nn import functional as F

from benchmarks.peers.torch_layers import classified, eager, embedding, mlp, tensor, trained


def word_embedding_step(params, batch, wrap=eager):
    def loss(model, centres, contexts, negatives):
        inputs, outputs = model
        x = inputs(centres)
        near = (x * outputs(contexts)).sum(-1)
        far = torch.einsum("bd,bnd->bn", x, outputs(negatives))
        return -(F.logsigmoid(near) + F.logsigmoid(-far).sum(-1)).mean()

    return trained(nn.ModuleList(map(embedding, params)), map(tensor, batch), loss, wrap)


class GraphNetwork(nn.Module):
    def __init__(self, params):
        super().__init__()
        layers, head = params
        self.messages = nn.ModuleList(mlp(message) for message, _ in layers)
        self.updates = nn.ModuleList(mlp(update) for _, update in layers)
        self.head = mlp(head)

    def forward(self, x, senders, receivers):
        # index_select's backward is index_add_; that of x[senders] is a slower index_put_.
        for message, update in zip(self.messages, self.updates):
            edges = torch.cat([x.index_select(0, senders), x.index_select(0, receivers)], -1)
            sums = torch.zeros_like(x).index_add_(0, receivers, F.relu(message(edges)))
            x = x + update(torch.cat([x, sums], -1))
        return self.head(x)


def graph_network_step(params, batch, wrap=eager):
    def loss(model, x, senders, receivers, labels):
        return classified(lambda x: model(x, senders, receivers), x, labels)

    return trained(GraphNetwork(params), map(tensor, batch), loss, wrap)


def physics_informed_step(params, batch, wrap=eager):
    def loss(model, points):
        t, x = (c.detach().requires_grad_() for c in points.split(1, -1))
        u = model(torch.cat([t, x], -1))
        u_t, u_x = grad(u.sum(), (t, x), create_graph=True)
        (u_xx,) = grad(u_x.sum(), x, create_graph=True)
        return (u_t + u * u_x - 0.01 / math.pi * u_xx).square().mean()

    return trained(mlp(params, nn.Tanh), map(tensor, batch), loss, wrap)
