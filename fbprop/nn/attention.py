"""Attention, and the positions that it does not know by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fbprop import ops
from fbprop.nn import initializers
from fbprop.nn.layer import Layer
from fbprop.nn.linear import dense
from fbprop.nn.regularization import dropout as dropout_layer
from fbprop.nn.shapes import (
    check_sequence,
    parameter,
    without_padding,
)


def attention(heads: int, *, causal: bool = True, dropout: float = 0.0, bias: bool = True,
              kernel_init=initializers.lecun_normal(), out_init=initializers.lecun_normal(),
              dtype=jnp.float32, name: str = "attention") -> Layer:
    """Multi-head self-attention over [B, T, D] (Vaswani et al. 2017).

    Each head computes softmax(Q Kᵀ / sqrt(D / heads)) V, of D / heads features, from projections of
    x; the heads together are projected once more. Scores and softmax are in float32 at least.

    Parameters: ``qkv``, a `dense` from D to the three projections [D, 3 D], in each of which the
    heads follow one another; ``out``, a `dense` [D, D].

    Args:
      heads: how many; a divisor of D.
      causal: a step attends to itself and earlier ones only; else to all.
      dropout: of the probabilities, in training.
      bias: whether the projections have one.
      kernel_init: of ``qkv``.   out_init: of ``out``.   dtype: of the parameters.

    With ``apply(..., lengths=lengths)`` no step attends to padding, and the output there is 0.

    Raises:
      ValueError: the input is not [B, T, D]; heads does not divide D; dropout without a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> init, apply = nn.attention(2)
      >>> x = jnp.ones((3, 5, 4))
      >>> params = init(jax.random.key(0), x)
      >>> apply(params, x, lengths=jnp.array([5, 1, 2])).shape, params["qkv"]["kernel"].shape
      ((3, 5, 4), (4, 12))
    """
    dropout_layer(dropout)  # says what is wrong with a rate that is no probability

    def projections(x):
        check_sequence(name, x)
        size = x.shape[-1]
        if size % heads:
            raise ValueError(
                f"Layer {name!r} splits features into equal heads, got heads={heads} expected a "
                f"divisor of {size} features."
            )
        qkv = dense(3 * size, bias=bias, kernel_init=kernel_init, dtype=dtype, name="qkv")
        return qkv, dense(size, bias=bias, kernel_init=out_init, dtype=dtype, name="out")

    def init(key, x):
        keys = jax.random.split(key)
        return {p.name: p.init(k, x) for p, k in zip(projections(x), keys)}

    def apply(params, x, *, key, train, lengths):
        qkv, out = projections(x)
        each = qkv.apply(parameter(name, params, "qkv"), x)
        q, k, v = jnp.split(each, 3, axis=-1)
        q, k, v = (_by_head(a, heads) for a in (q, k, v))
        y = ops.attention(
            q, k, v, causal=causal, lengths=lengths, dropout=dropout if train else 0.0, key=key)
        y = out.apply(params["out"], y.reshape(x.shape))
        return y if lengths is None else without_padding(y, lengths)

    return Layer(init, apply, name)


def position_embedding(context: int, *, embedding_init=initializers.normal(0.01),
                       dtype=jnp.float32, name: str = "position_embedding") -> Layer:
    """Adds a learned vector for each position: y[:, t] = x[:, t] + embedding[t].

    Parameters: ``embedding`` [context, D], at first normal with standard deviation 0.01 (as in
    GPT-2's code).

    Args:
      context: the longest sequence.
      embedding_init: see `fbprop.nn.initializers`.
      dtype: of the parameters.

    Raises:
      ValueError: the input is not [B, T, D]; T > context.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> init, apply = nn.position_embedding(7)
      >>> x = jnp.ones((2, 5, 3))
      >>> apply(init(jax.random.key(0), x), x).shape
      (2, 5, 3)
    """

    def init(key, x):
        return {"embedding": embedding_init(key, (context, x.shape[-1]), dtype)}

    def apply(params, x):
        check_sequence(name, x)
        if x.shape[1] > context:
            raise ValueError(
                f"Layer {name!r} has vectors for context={context} positions, got a sequence of "
                f"{x.shape[1]} expected at most {context}: cut it, or make context larger."
            )
        return x + params["embedding"][:x.shape[1]]

    return Layer(init, apply, name)


def _by_head(x, heads):
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
