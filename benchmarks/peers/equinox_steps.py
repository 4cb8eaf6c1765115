"""Equinox, its own layers, vmapped over the batch as its users do, and their default backward."""

from __future__ import annotations

from benchmarks.peers.adam_steps import trained, trained_epoch
from benchmarks.peers.equinox_image_steps import (
    convnet_epoch,
    convnet_step,
    resnet_step,
    vae_step,
    vit_step,
)
from benchmarks.peers.equinox_layers import MLP, classified
from benchmarks.peers.equinox_other_steps import (
    graph_network_step,
    physics_informed_step,
    word_embedding_step,
)
from benchmarks.peers.equinox_sequence_steps import (
    gpt_step,
    gru_character_step,
    lstm_character_step,
)

__all__ = [
    "convnet_epoch", "convnet_step", "gpt_step", "graph_network_step", "gru_character_step",
    "lstm_character_step", "mlp_epoch", "mlp_step", "physics_informed_step", "resnet_step",
    "vae_step", "vit_step", "word_embedding_step",
]


def mlp_step(params, batch):
    return trained(*classified(MLP(params), lambda model, x: model(x)), batch)


def mlp_epoch(params, batches):
    return trained_epoch(*classified(MLP(params), lambda model, x: model(x)), batches)
