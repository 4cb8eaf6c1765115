"""Rows of the operations of fbprop.ops; ``plain`` is what they stand for."""

import jax.numpy as jnp
import numpy as np

from cases.case import Case, real
from fbprop.rules.attend import attend, plain
from fbprop.rules.attention import Form


def attention(label, q, k, v, form, bias=None, mask=None, lengths=None):
    """A row of attention; shapes are [B, T, K, G, D], [B, S, K, D], [B, S, K, E]."""
    mask = None if mask is None else np.random.default_rng(1).integers(0, 3, mask) > 0
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)[:, None]

    def of(function):
        return lambda q, k, v, *bias: function(q, k, v, *(bias or [None]), mask, lengths, None,
                                               form=form)

    specs = [real(*q), real(*k), real(*v), *([] if bias is None else [real(*bias)])]
    return Case("attention", of(attend), tuple(specs), label, plain=of(plain))


CASES = [
    attention("causal", (2, 5, 3, 1, 2), (2, 5, 3, 2), (2, 5, 3, 2), Form(0.7, causal=True)),
    attention("groups, bias and mask", (1, 3, 2, 3, 2), (1, 5, 2, 2), (1, 5, 2, 3), Form(0.5),
              (1, 2, 3, 3, 5), (1, 1, 3, 1, 5)),
    attention("window and lengths", (2, 3, 1, 1, 2), (2, 3, 1, 2), (2, 3, 1, 2),
              Form(0.7, window=(1, 1)), lengths=[[3, 2], [2, 3]]),
]
