"""Ready language models: from tokens [B, T] to logits [B, T, vocabulary] of each next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fbprop import ops
from fbprop.nn import initializers
from fbprop.nn.activations import gelu
from fbprop.nn.attention import attention, position_embedding
from fbprop.nn.compose import (
    apply_in_order,
    check_names,
    composed,
    distinct,
    init_in_order,
    repeated,
    residual,
    sequential,
    state_in_order,
)
from fbprop.nn.layer import Layer, function
from fbprop.nn.linear import dense, embedding
from fbprop.nn.normalization import layer_norm
from fbprop.nn.recurrent import gru, lstm
from fbprop.nn.regularization import dropout as dropout_layer


def gpt(vocabulary: int, *, layers: int, heads: int, features: int, context: int,
        dropout: float = 0.0, tie: bool = True, scan: bool = False, remat: bool = False,
        dtype=jnp.float32, name: str = "gpt") -> Layer:
    """Decoder-only transformer, as GPT-2 (Radford et al. 2019).

    Token and position embeddings; blocks of causal `attention` and of a dense layer to
    4 · features with GELU and back, each around a shortcut and after a `layer_norm`; a last
    `layer_norm`; logits by the token embedding transposed.

    Initial values are GPT-2's: kernels normal with standard deviation 0.02, for the two
    projections of a block that end in a shortcut 0.02 / sqrt(2 · layers); biases 0. GPT-2 small is
    ``gpt(50257, layers=12, heads=12, features=768, context=1024, dropout=0.1)``.

    Args:
      vocabulary: tokens are integers 0..vocabulary−1.
      layers: blocks.
      heads: of each attention; a divisor of features.
      features: D.
      context: the longest sequence.
      dropout: of embeddings, attention's probabilities and both branches' results, in training.
      tie: whether logits share the token embedding; else they have a kernel of their own,
        ``head``.
      scan: blocks as one `repeated`: parameters stacked, ``["repeated"]["block"]``, compiled once
        for all; else ``["block_0"]``, ``["block_1"]``, ...
      remat: see `repeated`; for ``scan=True``.
      dtype: of the parameters.

    Raises:
      ValueError: heads does not divide features; T > context; remat without scan; dropout without
        a key.   TypeError: tokens are not integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.gpt(65, layers=2, heads=2, features=8, context=16)
      >>> tokens = jnp.zeros((3, 16), jnp.int32)
      >>> params = net.init(jax.random.key(0), tokens)
      >>> net.apply(params, tokens).shape, sorted(params)[:3]
      ((3, 16, 65), ['block_0', 'block_1', 'embedding'])
    """
    if remat and not scan:
        raise ValueError(
            "gpt computes blocks again as parts of a scan, got remat=True with scan=False expected "
            "scan=True."
        )
    block = transformer_block(layers, heads, features, dropout, dtype)
    blocks = [repeated(block, layers, remat=remat)] if scan else [block] * layers
    body = [
        embedding(vocabulary, features, dtype=dtype), position_embedding(context, dtype=dtype),
        *_dropout(dropout), *blocks, layer_norm(dtype=dtype),
    ]
    kernel_init = initializers.normal(0.02)
    head = dense(vocabulary, bias=False, kernel_init=kernel_init, dtype=dtype, name="head")
    return _with_logits(body, None if tie else head, name)


def lstm_lm(vocabulary: int, *, features: int, layers: int = 1, dropout: float = 0.0,
            tie: bool = False, dtype=jnp.float32, name: str = "lstm_lm") -> Layer:
    """Language model of `lstm` layers (Zaremba et al. 2014).

    Embedding of the tokens, LSTMs, logits by a dense layer ``head``.

    Args:
      vocabulary: tokens are integers 0..vocabulary−1.
      features: of the embedding and of each LSTM.
      layers: how many LSTMs.
      dropout: before and after each LSTM, in training; not from step to step.
      tie: whether logits are by the embedding transposed (Press & Wolf 2017); else by ``head``.
      dtype: of the parameters.

    Raises:
      TypeError: tokens are not integers.   ValueError: dropout without a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.lstm_lm(65, features=8, layers=2)
      >>> net.out_shape(jax.ShapeDtypeStruct((3, 7), jnp.int32)).shape
      (3, 7, 65)
    """
    return _recurrent_lm(lstm, vocabulary, features, layers, dropout, tie, dtype, name)


def gru_lm(vocabulary: int, *, features: int, layers: int = 1, dropout: float = 0.0,
           tie: bool = False, dtype=jnp.float32, name: str = "gru_lm") -> Layer:
    """Language model of `gru` layers; otherwise as `lstm_lm`.

    Args:
      vocabulary, features, layers, dropout, tie, dtype: see `lstm_lm`.

    Raises:
      TypeError: tokens are not integers.   ValueError: dropout without a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.gru_lm(65, features=8)
      >>> net.out_shape(jax.ShapeDtypeStruct((3, 7), jnp.int32)).shape
      (3, 7, 65)
    """
    return _recurrent_lm(gru, vocabulary, features, layers, dropout, tie, dtype, name)


def next_token_loss(network: Layer, params, tokens, labels, *, where=None,
                    label_smoothing: float = 0.0, key=None, train: bool = False, lengths=None):
    """Mean cross-entropy of `gpt`'s, `lstm_lm`'s or `gru_lm`'s logits, without the logits.

    `softmax_cross_entropy` of ``network.apply(params, tokens)``, with the last product and the loss
    as one, `fbprop.ops.linear_cross_entropy`: kept is its gradient in place of logits [B, T, V].

    Args:
      network: what `gpt`, `lstm_lm` or `gru_lm` returned, not renamed.
      params, tokens, key, train, lengths: as for its `apply`.
      labels: integers [B, T]: the tokens that come next.
      where: bool [B, T]; which of them count. Default: all. If none does, the loss is 0.
      label_smoothing: see `softmax_cross_entropy`.

    Returns:
      A scalar in nats, float32 at least.

    Raises:
      TypeError: another network.   Others as `softmax_cross_entropy` and ``network.apply``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.gpt(7, layers=1, heads=1, features=4, context=8)
      >>> tokens = jnp.arange(9)[None] % 7
      >>> params = net.init(jax.random.key(0), tokens[:, :-1])
      >>> loss = nn.next_token_loss(net, params, tokens[:, :-1], tokens[:, 1:])
      >>> logits = net.apply(params, tokens[:, :-1])
      >>> bool(jnp.allclose(loss, nn.softmax_cross_entropy(logits, tokens[:, 1:])))
      True
    """
    if not isinstance(network, _LanguageModel):
        raise TypeError(
            f"next_token_loss knows where gpt, lstm_lm and gru_lm end, got {network!r} expected "
            "one of these: of another network take softmax_cross_entropy of its logits."
        )
    hidden = network.hidden.apply(params, tokens, key=key, train=train, lengths=lengths)
    kernel, bias = network.head(params)
    weights = None if where is None else jnp.asarray(where).astype(kernel.dtype)
    return ops.linear_cross_entropy(hidden, kernel, labels, bias=bias, weights=weights,
                                    label_smoothing=label_smoothing)


class _LanguageModel(Layer):
    """A network that ends in a product: what comes before it, ``hidden``, and its factors."""

    def __init__(self, network: Layer, hidden: Layer, head: Callable):
        super().__init__(network._init, network._apply, network.name, network._init_state,
                         network.parts)
        self.hidden, self.head = hidden, head


def _recurrent_lm(cell: Callable, vocabulary, features, layers, dropout, tie, dtype, name):
    body = [embedding(vocabulary, features, dtype=dtype), *_dropout(dropout)]
    for _ in range(layers):
        body += [cell(features, dtype=dtype), *_dropout(dropout)]
    return _with_logits(body, None if tie else dense(vocabulary, dtype=dtype, name="head"), name)


def transformer_block(layers, heads, features, dropout, dtype, causal=True):
    """GPT-2's block, one of ``layers``; ViT's where attention is not causal."""
    kernel_init = initializers.normal(0.02)
    out_init = initializers.normal(0.02 / math.sqrt(2 * layers))
    attend = attention(heads, causal=causal, dropout=dropout, kernel_init=kernel_init,
                       out_init=out_init, dtype=dtype)
    widen = dense(4 * features, kernel_init=kernel_init, dtype=dtype)
    narrow = dense(features, kernel_init=out_init, dtype=dtype)
    return sequential(
        residual(layer_norm(dtype=dtype), attend, *_dropout(dropout), name="attention"),
        residual(layer_norm(dtype=dtype), widen, gelu(), narrow, *_dropout(dropout), name="mlp"),
        name="block",
    )


def _with_logits(body: Sequence[Layer], head: Layer | None, name):
    """The layers of ``body``, an embedding first, then ``head``; None: the embedding transposed."""
    if head is not None:
        # In the head's place stands nothing, so that the others get the same keys.
        hidden = sequential(*body, function(lambda x: x, head.name), name=name)
        factors = lambda params: (params[head.name]["kernel"], params[head.name].get("bias"))
        return _LanguageModel(sequential(*body, head, name=name), hidden, factors)
    layers = distinct(body)

    def init(key, x):
        return init_in_order(layers, key, x)

    def hidden(params, x, *, state, **told):
        check_names(name, params, layers)
        return apply_in_order(layers, params, x, state=state, **told)

    def apply(params, x, **told):
        y, state = hidden(params, x, **told)
        with jax.named_scope("head"):
            return y @ factors(params)[0], state

    factors = lambda params: (params[layers[0].name]["embedding"].T, None)
    both = (composed(init, f, name, lambda x: state_in_order(layers, x), layers)
            for f in (apply, hidden))
    return _LanguageModel(*both, factors)


def _dropout(rate):
    return [dropout_layer(rate)] if rate else []
