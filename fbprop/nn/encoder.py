"""A bidirectional transformer: from tokens to a vector for each of them, which has seen all."""

from __future__ import annotations

import jax.numpy as jnp

from fbprop.nn import initializers
from fbprop.nn.activations import gelu
from fbprop.nn.attention import attention, position_embedding
from fbprop.nn.compose import residual, sequential
from fbprop.nn.layer import Layer
from fbprop.nn.linear import dense, embedding
from fbprop.nn.normalization import layer_norm
from fbprop.nn.regularization import dropout as dropout_layer


def encoder(vocabulary: int, *, layers: int, heads: int, features: int, context: int,
            hidden: int | None = None, dropout: float = 0.0, epsilon: float = 1e-12,
            dtype=jnp.float32, name: str = "encoder") -> Layer:
    """Encoder-only transformer, as BERT (Devlin et al. 2019): tokens [B, T] to [B, T, features].

    Token and position embeddings and a `layer_norm`; blocks of attention to all steps and of a
    dense layer to ``hidden`` with exact GELU and back, each around a shortcut and *before* a
    `layer_norm`. BERT's vector for a first segment is the same for all tokens of one text, so it is
    a part of the position embedding here; its pooler is a head, and is left to the caller. BERT
    base is ``encoder(30522, layers=12, heads=12, features=768, context=512, dropout=0.1)``.

    With ``apply(..., lengths=lengths)`` no token attends to padding; what stands at padding has no
    meaning, so pool with `sequence_mask`.

    Args:
      vocabulary: tokens are integers 0..vocabulary−1.
      layers: blocks.
      heads: of each attention; a divisor of features.
      features: D.
      context: the longest sequence.
      hidden: features between a block's two dense layers; None: 4 · features.
      dropout: of embeddings, attention's probabilities and both branches' results, in training.
      epsilon: of each `layer_norm`.
      dtype: of the parameters.

    Raises:
      ValueError: heads does not divide features; T > context; dropout without a key.
      TypeError: tokens are not integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.encoder(31, layers=2, heads=2, features=8, context=16)
      >>> tokens = jnp.zeros((3, 5), jnp.int32)
      >>> params = net.init(jax.random.key(0), tokens)
      >>> net.apply(params, tokens, lengths=jnp.array([5, 1, 2])).shape
      (3, 5, 8)
    """
    normal = initializers.normal(0.02)
    drop = [dropout_layer(dropout)] if dropout else []

    def norm():
        return layer_norm(epsilon=epsilon, dtype=dtype)

    attend = attention(heads, causal=False, dropout=dropout, kernel_init=normal, out_init=normal,
                       dtype=dtype)
    widen = dense(4 * features if hidden is None else hidden, kernel_init=normal, dtype=dtype)
    narrow = dense(features, kernel_init=normal, dtype=dtype)
    block = sequential(
        residual(attend, *drop, name="attention"), norm(),
        residual(widen, gelu(approximate=False), narrow, *drop, name="mlp"), norm(),
        name="block",
    )
    positions = position_embedding(context, embedding_init=normal, dtype=dtype)
    return sequential(
        embedding(vocabulary, features, dtype=dtype), positions, norm(), *drop, *[block] * layers,
        name=name,
    )
