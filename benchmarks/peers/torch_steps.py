"""PyTorch, eager: networks are modules whose weights are copied from ours."""

from __future__ import annotations

from benchmarks.peers.torch_image_steps import (
    convnet_epoch,
    convnet_step,
    resnet_step,
    vae_step,
    vit_step,
)
from benchmarks.peers.torch_layers import classified, eager, mlp, tensor, trained, trained_epoch
from benchmarks.peers.torch_other_steps import (
    graph_network_step,
    physics_informed_step,
    word_embedding_step,
)
from benchmarks.peers.torch_sequence_steps import (
    gpt_step,
    gru_character_step,
    lstm_character_step,
)

__all__ = [
    "convnet_epoch", "convnet_step", "gpt_step", "graph_network_step", "gru_character_step",
    "lstm_character_step", "mlp_epoch", "mlp_step", "physics_informed_step", "resnet_step",
    "vae_step", "vit_step", "word_embedding_step",
]


def mlp_step(params, batch, wrap=eager):
    return trained(mlp(params), map(tensor, batch), classified, wrap)


def mlp_epoch(params, batches, wrap=eager):
    return trained_epoch(mlp(params), map(tensor, batches), classified, wrap)
