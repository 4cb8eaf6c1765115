"""Rows of the operations of fbprop.ops; ``plain`` is what they stand for."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from cases.case import Case, apart, positive, real
from fbprop.ops import activation, losses, normalization
from fbprop.rules.attend import attend, plain
from fbprop.rules.attention import Form

ctc, turn, drop = (sys.modules[f"fbprop.ops.{name}"] for name in ("ctc", "rotary", "dropout"))
recurrent = sys.modules["fbprop.ops.recurrent"]
lce = sys.modules["fbprop.ops.linear_cross_entropy"]  # its function has the module's name


def attention(label, q, k, v, form, bias=None, mask=None, lengths=None):
    """A row of attention; shapes are [B, T, K, G, D], [B, S, K, D], [B, S, K, E]."""
    mask = None if mask is None else np.random.default_rng(1).integers(0, 3, mask) > 0
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)[:, None]

    def of(function):
        return lambda q, k, v, *bias: function(q, k, v, *(bias or [None]), mask, lengths, None,
                                               form=form)

    specs = [real(*q), real(*k), real(*v), *([] if bias is None else [real(*bias)])]
    return Case("attention", of(attend), tuple(specs), label, plain=of(plain))


def cross_entropy(function, label, form, bias=True, summed=True):
    """A row of linear cross-entropy: five rows, three features, four classes."""
    labels = jnp.array([0, 3, 1, 1, 2], jnp.int32)
    plain = (lambda *x, form: jnp.sum(lce.reference(*x, form=form))) if summed else lce.reference

    def of(function):
        return lambda x, w, share, *bias: function(x, w, *(bias or [None]), share, labels,
                                                   form=form)

    specs = (real(5, 3), real(3, 4), positive(5), *([real(4)] if bias else []))
    # Besides x, w, share and labels: losses and the gradient.
    kept = 8 * (5 + 5 + 15 + 12 + (4 if bias else 0)) if summed else None
    return Case(function.name, of(function), specs, label, plain=of(plain), kept=kept)


def norm(label, shape, axes, centred, scale=True, bias=True, features=1):
    form = {"axes": axes, "centred": centred, "epsilon": 0.1, "features": features}

    def of(function):
        return lambda x, *more: function(x, more[0] if scale else None,
                                         more[-1] if bias else None, **form)

    specs = [real(*shape), *[real(*shape[len(shape) - features:])] * (scale + bias)]
    return Case("normalize", of(normalization.normalize), tuple(specs), label,
                plain=of(normalization.reference))


def dropped(shape):
    def of(function):
        return lambda x: function(x, jnp.array([3, 7], jnp.uint32), rate=0.3, impl="threefry2x32")

    return Case("dropout", of(drop._dropout), (real(*shape),), plain=of(drop._dropout.reference))


def activated(operation, label, name, *operands):
    return Case(operation.name, lambda *x: operation(*x, name=name), operands, label,
                plain=lambda *x: operation.reference(*x, name=name))


def loss(operation, label, *operands, labels=None, **form):
    labels = () if labels is None else (jnp.array(labels, jnp.int32),)
    return Case(operation.name, lambda *x: operation(*x, *labels, **form), operands, label,
                plain=lambda *x: operation.reference(*x, *labels, **form))


def spelling(label, frames, classes, labels, logit_lengths, label_lengths, blank):
    """A row of `ctc_loss`, of an example per list of labels."""
    rest = [jnp.array(a, jnp.int32) for a in (labels, logit_lengths, label_lengths)]

    def of(function):
        return lambda z: function(z, *rest, blank=blank)

    return Case("ctc_loss", of(ctc._ctc), (real(len(labels), frames, classes),), label,
                plain=of(ctc.reference))


def rotated(label, shape, interleaved):
    form = {"base": 7.0, "interleaved": interleaved}
    positions = jnp.arange(shape[-3], dtype=jnp.int32) * 2

    def of(function):
        return lambda x: function(x, positions, **form)

    return Case("rotary", of(turn._rotary), (real(*shape),), label,
                plain=of(turn._rotary.reference))


def over_time(operation, label, biases, states, gates, lengths=None, **static):
    """A row of a recurrent operation: three steps of two features into two, and what it keeps."""
    wide, T = max(biases), 3
    shapes = [(2, T, 2), (2, 2 * wide), (2, 2 * wide), *((2 * n,) for n in biases)]
    kept = 4 * T + 8 * wide + 4 + 4 * T * (1 + gates) + (0 if lengths is None else 1)
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)

    def of(function):
        return lambda *operands: function(*operands, lengths, **static)

    specs = *(real(*s) for s in shapes), *[real(2, 2)] * states
    return Case(operation.name, of(operation), specs, label, plain=of(operation.reference),
                kept=8 * kept)


CASES = [
    dropped((2, 3, 5)),
    over_time(recurrent._lstm, "", [4], 2, 5, [3, 2]),
    over_time(recurrent._gru, "", [3, 1], 1, 4),
    over_time(recurrent._rnn, "", [1], 1, 0, activation="tanh"),
    spelling("", 5, 3, [[1, 1], [2, 1]], [5, 4], [2, 1], 0),
    spelling("blank", 3, 3, [[1]], [3], [1], 2),
    rotated("halves", (2, 5, 3, 2), False), rotated("neighbours", (5, 1, 6), True),
    loss(losses._softmax_of_class, "", real(2, 3, 5), labels=[[0, 4, 2], [1, 1, 0]], smoothing=0.2),
    # By the public function: a number as logits is not a row of them, which only that one checks.
    Case("softmax_cross_entropy_of_shares", losses.softmax_cross_entropy,
         (real(3, 5), positive(3, 5)), plain=losses._softmax_of_shares.reference),
    loss(losses._sigmoid, "", real(2, 3), positive(2, 3)), loss(losses._sigmoid, "classes", real(3),
                                                                labels=[0, 1, 1]),
    loss(losses._huber, "", real(2, 3), real(2, 3), delta=0.7),
    *(activated(activation._activate, name, name, apart(2, 3)) for name in activation.ACTIVATIONS),
    activated(activation._gate, "silu", "silu", real(2, 3), real(2, 3)),
    activated(activation._gate, "gelu", "gelu", real(2, 3), real(2, 3)),
    activated(activation._dense, "tanh", "tanh", real(2, 3, 5), real(5, 2), real(2)),
    Case("dense", lambda x, w: activation._dense(x, w, None, name="silu"), (real(3, 5), real(5, 2)),
         "no bias", plain=lambda x, w: jax.nn.silu(x @ w)),
    norm("layers", (3, 5), (1,), True), norm("layers, bare", (3, 5), (1,), True, False, False),
    norm("rms", (2, 3, 5), (2,), False, bias=False), norm("bias", (3, 5), (1,), True, False),
    norm("groups", (2, 3, 2, 2), (1, 3), True, features=2), norm("batch", (5, 2, 3), (0, 1), True),
    cross_entropy(lce.cross_entropy, "", lce.Form(), bias=False),
    cross_entropy(lce.cross_entropy, "all terms", lce.Form(0.1, 0.2, 1.5)),
    cross_entropy(lce.cross_entropies, "all terms", lce.Form(0.1, 0.2, 1.5), summed=False),
    attention("causal", (2, 5, 3, 1, 2), (2, 5, 3, 2), (2, 5, 3, 2), Form(0.7, causal=True)),
    attention("groups, bias and mask", (1, 3, 2, 3, 2), (1, 5, 2, 2), (1, 5, 2, 3), Form(0.5),
              (1, 2, 3, 3, 5), (1, 1, 3, 1, 5)),
    attention("window and lengths", (2, 3, 1, 1, 2), (2, 3, 1, 2), (2, 3, 1, 2),
              Form(0.7, window=(1, 1)), lengths=[[3, 2], [2, 3]]),
]
