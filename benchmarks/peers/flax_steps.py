"""Flax (linen), its own layers and their default backward."""

from __future__ import annotations

from benchmarks.peers.adam_steps import trained, trained_epoch
from benchmarks.peers.flax_image_steps import (
    convnet_epoch,
    convnet_step,
    resnet_step,
    vae_step,
    vit_step,
)
from benchmarks.peers.flax_layers import MLP, classified, mlp, sizes
from benchmarks.peers.flax_other_steps import (
    graph_network_step,
    physics_informed_step,
    word_embedding_step,
)
from benchmarks.peers.flax_sequence_steps import (
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
    return trained(classified(MLP(sizes(params))), mlp(params), batch)


def mlp_epoch(params, batches):
    return trained_epoch(classified(MLP(sizes(params))), mlp(params), batches)
