"""Recurrent operations over time: LSTM, gated recurrent unit, simple recurrent network.

``z_t = x_t W + h_t−1 U + b``, and the cell, whose gates are kept, so that backward no product is
made again. ``W̄ = Σ x_tᵀ z̄_t``, ``Ū = Σ h_t−1ᵀ z̄_t`` and ``x̄_t = z̄_t Wᵀ`` are products of 8 to 16
steps at once (`fbprop.ops.recurrence`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core.operation import Operation
from fbprop.core.precision import at_least_float32
from fbprop.ops import recurrence
from fbprop.ops.arguments import recurrent_arguments
from fbprop.ops.recurrence import Cell, Weights
from fbprop.rules import register
from fbprop.rules.sweep import chunk_size

ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}
SLOPES = {"tanh": lambda h: 1 - h * h, "relu": lambda h: (h > 0).astype(h.dtype)}


def lstm(x, kernel, recurrent, bias=None, *, initial=None, lengths=None, reverse: bool = False,
         bidirectional: bool = False):
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    At each step::

        i, f, g, o = x W + h U + b              # four times [B, H], in this order
        c = sigmoid(f) c + sigmoid(i) tanh(g)   # in float32 at least
        h = sigmoid(o) tanh(c)                  # the output

    backward, from the last step, with the gates and c before it::

        c̄ += h̄ o (1 − tanh² c);  z̄ = c̄ g i(1 − i), c̄ c f(1 − f), c̄ i (1 − g²), h̄ tanh(c) o(1 − o)
        c̄ ← c̄ f, h̄ ← z̄ Uᵀ

    | kept | shape | instead of |
    |---|---|---|
    | x, W, U, outputs; i, f, g, o, c | as given; [T, H, B] each, c float32 | 12 of [T, B, H] |

    Args:
      x: [B, T, D], floating.
      kernel: W, [D, 4 H]; recurrent: U, [H, 4 H]; both of x's dtype.
      bias: b, [4 H]; None: 0.
      initial: the state (h, c) before the first step, [B, H] each; None: 0.
      lengths: [B] integers, how many steps are real; of a padded one the output is 0, the state
        stays, x is not read. None: all.
      reverse: from the last real step to the first; the output of step t still stands at t.
      bidirectional: in both directions, with weights, bias and initial state of either, forward
        first, in one more dimension in front ([2, D, 4 H]); outputs side by side, states [2, B, H].

    Returns:
      Outputs [B, T, H] in x's dtype; the last state (h, c), c in float32 at least.

    Raises:
      ValueError: shapes that do not fit.   TypeError: x is not floating, or of another dtype than
        its weights, or lengths are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> y, (h, c) = ops.lstm(jnp.ones((2, 7, 3)), jnp.ones((3, 20)), jnp.ones((5, 20)))
      >>> y.shape, c.shape
      ((2, 7, 5), (2, 5))
    """
    weights = recurrent_arguments("lstm", 4, x, kernel, recurrent, {"bias": (bias, 4)}, initial,
                                  ("h", "c"), lengths, bidirectional)
    return _directions(_lstm, weights, reverse, bidirectional)


def gru(x, kernel, recurrent, bias=None, recurrent_bias=None, *, initial=None, lengths=None,
        reverse: bool = False, bidirectional: bool = False):
    """Gated recurrent unit (Cho et al. 2014), the variant of cuDNN, PyTorch, Keras and Flax.

    At each step, h in float32 at least::

        r = sigmoid(x W_r + h U_r + b_r)
        z = sigmoid(x W_z + h U_z + b_z)
        m = h U_n + b_h;  n = tanh(x W_n + b_n + r m)
        h = (1 − z) n + z h

    backward, from the last step, with h before it::

        n̄ = h̄ (1 − z)(1 − n²), of r: n̄ m r(1 − r), of z: h̄ (h − n) z(1 − z), m̄ = n̄ r
        h̄ ← h̄ z + (of r, of z, m̄) Uᵀ

    | kept | shape | instead of |
    |---|---|---|
    | x, W, U, outputs; r, z, n, m | as given; [T, H, B] each | 9 of [T, B, H] |

    Args:
      x, initial, lengths, reverse, bidirectional: as for `lstm`; the state is h [B, H] alone.
      kernel: W, [D, 3 H], in the order r, z, n; recurrent: U, [H, 3 H].
      bias: b, [3 H]; recurrent_bias: b_h, [H]; None: 0.

    Returns:
      Outputs [B, T, H] in x's dtype, the last h in float32 at least.

    Raises:
      ValueError, TypeError: as `lstm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> y, h = ops.gru(jnp.ones((2, 7, 3)), jnp.ones((3, 15)), jnp.ones((5, 15)), reverse=True)
      >>> y.shape, h.shape
      ((2, 7, 5), (2, 5))
    """
    biases = {"bias": (bias, 3), "recurrent_bias": (recurrent_bias, 1)}
    weights = recurrent_arguments("gru", 3, x, kernel, recurrent, biases, initial, ("h",), lengths,
                                  bidirectional)
    return _directions(_gru, weights, reverse, bidirectional)


def rnn(x, kernel, recurrent, bias=None, *, activation: str = "tanh", initial=None, lengths=None,
        reverse: bool = False, bidirectional: bool = False):
    """Simple recurrent network (Elman 1990): h = tanh(x W + h U + b), or relu.

    Backward, from the last step: z̄ = h̄ (1 − h²), or h̄ where h > 0;  h̄ ← z̄ Uᵀ.

    | kept | shape | instead of |
    |---|---|---|
    | x, W, U, outputs | as given | 1 to 2 of [T, B, H] |

    Args:
      x, initial, lengths, reverse, bidirectional: as for `lstm`; the state is h [B, H] alone.
      kernel: W, [D, H]; recurrent: U, [H, H]; bias: b, [H], or None: 0.
      activation: "tanh" or "relu".

    Returns:
      Outputs [B, T, H] in x's dtype, the last h in float32 at least.

    Raises:
      ValueError: no such activation; else, and TypeError, as `lstm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> y, h = ops.rnn(jnp.ones((1, 3, 1)), jnp.eye(1), jnp.eye(1), activation="relu")
      >>> y.ravel().tolist()
      [1.0, 2.0, 3.0]
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"rnn's activation is 'tanh' or 'relu', got {activation!r}.")
    weights = recurrent_arguments("rnn", 1, x, kernel, recurrent, {"bias": (bias, 1)}, initial,
                                  ("h",), lengths, bidirectional)
    run = functools.partial(_rnn, activation=activation)
    return _directions(run, weights, reverse, bidirectional)


def _directions(operation, arguments, reverse, bidirectional):
    """In one direction, or in both with weights and states of either."""
    x, *own, lengths = arguments
    if not bidirectional:
        return _one_way(operation, x, own, lengths, reverse)
    each = [_one_way(operation, x, [None if a is None else a[i] for a in own], lengths, i == 1)
            for i in (0, 1)]
    outs, states = zip(*each)
    return jnp.concatenate(outs, -1), jax.tree.map(lambda *s: jnp.stack(s), *states)


def _one_way(operation, x, own, lengths, reverse):
    T = x.shape[1]
    if T == 0:  # as one step that is not real
        x, lengths = jnp.pad(x, ((0, 0), (0, 1), (0, 0))), jnp.zeros(len(x), jnp.int32)
    turned = functools.partial(_reversed, lengths=lengths) if reverse else lambda x: x
    out, *state = operation(turned(x), *own, lengths)
    return turned(out)[:, :T], state[0] if len(state) == 1 else tuple(state)


def _reversed(x, lengths):
    """Real steps in the other order; padded ones stay."""
    if lengths is None:
        return jnp.flip(x, 1)
    T = x.shape[1]
    t, lengths = jnp.arange(T, dtype=jnp.int32), jnp.minimum(lengths, T)[:, None]
    return jnp.take_along_axis(x, jnp.where(t < lengths, lengths - 1 - t, t)[..., None], 1)


# The cells

def _lstm_step(from_x, from_h, state):
    c = state[1]
    i, f, g, o = jnp.split(from_x + from_h, 4)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    new = f * c + i * g
    return [o * jnp.tanh(new), new], [i, f, g, o]


def _lstm_undo(dstate, gates, before, after):
    (dh, dc), (i, f, g, o), c = dstate, gates, before[1]
    squashed = jnp.tanh(f * c + i * g)
    dc = dc + dh * o * (1 - squashed * squashed)
    dz = jnp.concatenate([dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g),
                          dh * squashed * o * (1 - o)])
    return dz, dz, [0, dc * f]


def _gru_step(from_x, from_h, state):
    (h,) = state
    (xr, xz, xn), (hr, hz, m) = jnp.split(from_x, 3), jnp.split(from_h, 3)
    r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
    n = jnp.tanh(xn + r * m)
    return [(1 - z) * n + z * h], [r, z, n, m]


def _gru_undo(dstate, gates, before, after):
    (dh,), (r, z, n, m), (h,) = dstate, gates, before
    dn = dh * (1 - z) * (1 - n * n)
    dr, dz = dn * m * r * (1 - r), dh * (h - n) * z * (1 - z)
    return jnp.concatenate([dr, dz, dn]), jnp.concatenate([dr, dz, dn * r]), [dh * z]


def _rnn_cell(activation):
    def step(from_x, from_h, state):
        return [ACTIVATIONS[activation](from_x + from_h)], []

    def undo(dstate, gates, before, after):
        dz = dstate[0] * SLOPES[activation](after)
        return dz, dz, [0]

    return Cell(step, undo)


_LSTM, _GRU = Cell(_lstm_step, _lstm_undo), Cell(_gru_step, _gru_undo)


# The operations

def _run(cell, x, weights, state, lengths, wanted):
    """Outputs and last state, and what is kept, if a cotangent may be asked for."""
    state, keeps = _start(x, weights.recurrent, state), wanted is not None
    outs, state, kept = recurrence.forward(cell, x, weights, state, lengths, keeps)
    return (outs, *state, *kept)


def _start(x, recurrent, state):
    """The state before the first step, [B, H] each, 0 unless given."""
    none = at_least_float32(jnp.sum(jnp.zeros_like(x[:, 0]), 1, keepdims=True))  # laid out as x
    zero = none + jnp.zeros(recurrent.shape[0], none.dtype)
    return [zero if s is None else s for s in state]


def _back(cell, dys, x, kernel, recurrent, h, lengths, out, kept, wanted, biases):
    """A cotangent per operand: x, W, U, biases, states, lengths."""
    weights = Weights(kernel, recurrent, None, None)
    (h,) = _start(x, recurrent, [h])
    dx, dweights, dstate = recurrence.backward(
        cell, dys, x, weights, h, lengths, out, kept, (wanted[0], any(wanted[1:3 + biases])))
    return [dx, *dweights[:2 + biases], *dstate, None]


def _lstm_forward(x, kernel, recurrent, bias, h, c, lengths, *, wanted=None):
    return _run(_LSTM, x, Weights(kernel, recurrent, bias, None), [h, c], lengths, wanted)


def _lstm_backward(dys, x, kernel, recurrent, h, lengths, out0, i, f, g, o, before, *, wanted):
    kept = [i, f, g, o, before]
    return _back(_LSTM, dys, x, kernel, recurrent, h, lengths, out0, kept, wanted, 1)


def _gru_forward(x, kernel, recurrent, bias, recurrent_bias, h, lengths, *, wanted=None):
    # Of the product with h only the part of n has a bias.
    wide = None if recurrent_bias is None else jnp.pad(recurrent_bias, (2 * len(recurrent), 0))
    return _run(_GRU, x, Weights(kernel, recurrent, bias, wide), [h], lengths, wanted)


def _gru_backward(dys, x, kernel, recurrent, h, lengths, out0, r, z, n, m, *, wanted):
    dins = _back(_GRU, dys, x, kernel, recurrent, h, lengths, out0, [r, z, n, m], wanted, 2)
    dins[4] = dins[4][2 * len(recurrent):]
    return dins


def _rnn_forward(x, kernel, recurrent, bias, h, lengths, *, activation, wanted=None):
    cell = _rnn_cell(activation)
    return _run(cell, x, Weights(kernel, recurrent, bias, None), [h], lengths, wanted)


def _rnn_backward(dys, x, kernel, recurrent, h, lengths, out0, *, activation, wanted):
    cell = _rnn_cell(activation)
    return _back(cell, dys, x, kernel, recurrent, h, lengths, out0, [], wanted, 1)


def _over_time(step, x, state, lengths):
    """Plain code: ``step(x_t [B, D], state) -> state``, whose first is the output."""
    def one(state, now):
        t, x = now
        new, out = step(x, state), None
        if lengths is not None:
            real = (t < lengths)[:, None]
            new = [jnp.where(real, n, s) for n, s in zip(new, state)]
            out = jnp.where(real, new[0], 0)
        return new, new[0] if out is None else out

    now = jnp.arange(x.shape[1], dtype=jnp.int32), x.swapaxes(0, 1)
    state, outs = lax.scan(one, state, now)
    return outs.swapaxes(0, 1).astype(x.dtype), *state


def _product(a, w, bias):
    y = at_least_float32(a.astype(w.dtype) @ w)
    return y if bias is None else y + bias.astype(y.dtype)


def lstm_reference(x, kernel, recurrent, bias, h, c, lengths):
    def step(x, state):
        h, c = state
        i, f, g, o = jnp.split(_product(x, kernel, bias) + _product(h, recurrent, None), 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return [jax.nn.sigmoid(o) * jnp.tanh(c), c]

    return _over_time(step, x, _start(x, recurrent, [h, c]), lengths)


def gru_reference(x, kernel, recurrent, bias, recurrent_bias, h, lengths):
    def step(x, state):
        (h,) = state
        (xr, xz, xn), (hr, hz, m) = (
            jnp.split(a, 3, -1) for a in (_product(x, kernel, bias), _product(h, recurrent, None)))
        r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
        m = m if recurrent_bias is None else m + recurrent_bias.astype(m.dtype)
        return [(1 - z) * jnp.tanh(xn + r * m) + z * h]

    return _over_time(step, x, _start(x, recurrent, [h]), lengths)


def rnn_reference(x, kernel, recurrent, bias, h, lengths, *, activation):
    def step(x, state):
        z = _product(x, kernel, bias) + _product(state[0], recurrent, None)
        return [ACTIVATIONS[activation](z)]

    return _over_time(step, x, _start(x, recurrent, [h]), lengths)


def _formulation(site):
    steps = site.in_avals[0].shape[-2]
    return f"weights' cotangents of {chunk_size(steps) or steps} steps at once, on one device"


_lstm = Operation(
    "lstm", "z = x W + h U + b, c' = σ(f) c + σ(i) tanh g, h' = σ(o) tanh c';  W̄ = Σ xᵀ z̄, "
    "Ū = Σ hᵀ z̄, x̄ = z̄ Wᵀ, h̄ = z̄ Uᵀ.  Keeps x, W, U, outputs, gates and c.",
    lstm_reference, _lstm_forward, _lstm_backward, extras=("i", "f", "g", "o", "before"),
    results=3, formulation=_formulation, weighs=True,
)
_gru = Operation(
    "gru", "r, z = σ(x W + h U + b), n = tanh(x W + b + r (h U + b')), h' = (1 − z) n + z h;  "
    "W̄ = Σ xᵀ z̄, Ū = Σ hᵀ z̄', x̄ = z̄ Wᵀ, h̄ = h̄' z + z̄' Uᵀ.  Keeps x, W, U, outputs, gates.",
    gru_reference, _gru_forward, _gru_backward, extras=("r", "z", "n", "m"), results=2,
    formulation=_formulation, weighs=True,
)
_rnn = Operation(
    "rnn", "h' = f(x W + h U + b);  z̄ = h̄' f', W̄ = Σ xᵀ z̄, Ū = Σ hᵀ z̄, x̄ = z̄ Wᵀ, h̄ = z̄ Uᵀ.  "
    "Keeps x, W, U and outputs.",
    rnn_reference, _rnn_forward, _rnn_backward, results=2, formulation=_formulation, weighs=True,
)
register(*_lstm.rules, *_gru.rules, *_rnn.rules)
