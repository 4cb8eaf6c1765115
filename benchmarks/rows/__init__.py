"""The rows, by kind of code; importing this fills the table."""

from benchmarks.rows import (
    attention,
    checkpoint,
    contraction,
    convolution,
    costs,
    elementwise,
    image_steps,
    indexing,
    other_steps,
    per_example,
    pooling,
    recurrent,
    sequence_steps,
    steps,
    updates,
)

__all__ = [
    "attention", "checkpoint", "contraction", "convolution", "costs", "elementwise", "image_steps",
    "indexing", "other_steps", "per_example", "pooling", "recurrent", "sequence_steps", "steps",
    "updates",
]
