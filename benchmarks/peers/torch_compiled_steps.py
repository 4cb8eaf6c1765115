"""PyTorch through `torch.compile`: the eager steps, forward and backward compiled."""

from __future__ import annotations

import functools

import torch

from benchmarks.peers import torch_steps

mlp_step, convnet_step, gpt_step, lstm_character_step = (
    functools.partial(step, wrap=torch.compile)
    for step in (torch_steps.mlp_step, torch_steps.convnet_step, torch_steps.gpt_step,
                 torch_steps.lstm_character_step)
)
