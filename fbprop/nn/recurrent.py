"""Recurrent layers over sequences [B, T, D], padded ones too: LSTM and GRU by `fbprop.ops`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fbprop import ops
from fbprop.nn import initializers
from fbprop.nn.layer import Layer
from fbprop.nn.shapes import check_sequence, check_width, parameter


def lstm(features: int, *, reverse: bool = False, last: bool = False, forget_bias: float = 1.0,
         kernel_init=initializers.glorot_uniform(), recurrent_init=initializers.orthogonal(),
         dtype=jnp.float32, name: str = "lstm") -> Layer:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    From h = c = 0, at each step::

        i, f, g, o = x W + h U + b              # four times [B, features], in this order
        c = sigmoid(f) c + sigmoid(i) tanh(g)   # in float32 at least
        h = sigmoid(o) tanh(c)                  # the output

    Parameters: ``kernel`` W [D, 4 features], ``recurrent`` U [features, 4 features], ``bias``
    [4 features], at first 0 and ``forget_bias`` for f (Jozefowicz et al. 2015).

    With ``apply(..., lengths=lengths)`` a padded step leaves h and c as they are, and its output
    is 0; so the last state is that after a sequence's last real step, and `reverse` starts there.

    Args:
      features: size of h and c.
      reverse: from the last step to the first; the output of step t still stands at t.
      last: return the last h [B, features] in place of all [B, T, features].
      forget_bias: initial bias of the forget gate: at 1 it is open, at 0 half.
      kernel_init, recurrent_init: of each gate's part; see `fbprop.nn.initializers`.
      dtype: of the parameters.

    Raises:
      ValueError: the input is not [B, T, D]; D is another than at `init`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> x = jnp.ones((2, 7, 3))
      >>> layer = nn.lstm(5)
      >>> layer.apply(layer.init(jax.random.key(0), x), x, lengths=jnp.array([7, 2])).shape
      (2, 7, 5)
    """

    def init(key, x):
        params = _gates(key, x, features, 4, kernel_init, recurrent_init, dtype, name)
        bias = initializers.zeros(key, (4 * features,), dtype)
        return params | {"bias": bias.at[features:2 * features].set(forget_bias)}

    return _recurrent(name, init, ops.lstm, reverse, last)


def gru(features: int, *, reverse: bool = False, last: bool = False,
        kernel_init=initializers.glorot_uniform(), recurrent_init=initializers.orthogonal(),
        dtype=jnp.float32, name: str = "gru") -> Layer:
    """Gated recurrent unit (Cho et al. 2014), the variant of cuDNN, PyTorch, Keras and Flax.

    From h = 0, at each step::

        r = sigmoid(x W_r + h U_r + b_r)
        z = sigmoid(x W_z + h U_z + b_z)
        n = tanh(x W_n + b_n + r (h U_n + b_h))   # the paper has (r h) U_n
        h = (1 − z) n + z h                       # the output; the paper has z and 1 − z exchanged

    Parameters: ``kernel`` W [D, 3 features] and ``recurrent`` U [features, 3 features], in the
    order r, z, n; ``bias`` [3 features] and ``recurrent_bias`` b_h [features], at first 0.

    With ``apply(..., lengths=lengths)`` a padded step leaves h as it is, and its output is 0.

    Args:
      features: size of h.
      reverse, last, kernel_init, recurrent_init, dtype: as for `lstm`.

    Raises:
      ValueError: the input is not [B, T, D]; D is another than at `init`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> x = jnp.ones((2, 7, 3))
      >>> layer = nn.gru(5, last=True)
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 5)
    """

    def init(key, x):
        params = _gates(key, x, features, 3, kernel_init, recurrent_init, dtype, name)
        params["bias"] = initializers.zeros(key, (3 * features,), dtype)
        return params | {"recurrent_bias": initializers.zeros(key, (features,), dtype)}

    return _recurrent(name, init, ops.gru, reverse, last)


def bidirectional(cell: Callable[..., Layer], *, name: str = "bidirectional") -> Layer:
    """Two recurrent layers, one in either direction, outputs side by side [..., 2 features].

    Parameters: ``forward`` and ``backward``, those of the two layers.

    Args:
      cell: ``cell(reverse=..., name=...) -> Layer``, such as ``functools.partial(nn.gru, 64)``.
      name: see `Layer`.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> layer = nn.bidirectional(functools.partial(nn.gru, 5))
      >>> x = jnp.ones((2, 7, 3))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 7, 10)
    """
    both = cell(reverse=False, name="forward"), cell(reverse=True, name="backward")

    def init(key, x):
        return {part.name: part.init(k, x) for part, k in zip(both, jax.random.split(key))}

    def apply(params, x, *, lengths):
        each = [part.apply(params[part.name], x, lengths=lengths) for part in both]
        return jnp.concatenate(each, axis=-1)

    return Layer(init, apply, name)


def _recurrent(name, init, operation, reverse, last):
    """The layer of an operation over time, whose arguments are the parameters by their names."""

    def apply(params, x, *, lengths):
        check_sequence(name, x)
        check_width(name, x, parameter(name, params, "kernel").shape[0])
        kind = functools.reduce(jnp.promote_types, (a.dtype for a in params.values()), x.dtype)
        own = {k: a.astype(kind) for k, a in params.items()}
        y, state = operation(x.astype(kind), **own, lengths=lengths, reverse=reverse)
        y = jax.tree.leaves(state)[0] if last else y
        return y.astype(x.dtype)

    return Layer(init, apply, name)


def _gates(key, x, features, gates, kernel_init, recurrent_init, dtype, name):
    """Kernels of all gates side by side, each initialised for itself."""
    check_sequence(name, x)
    keys = jax.random.split(key, (2, gates))
    shapes = (x.shape[-1], features), (features, features)
    kernel, recurrent = (
        jnp.concatenate([initializers.made(make, k, shape, dtype) for k in ks], axis=1)
        for make, ks, shape in zip((kernel_init, recurrent_init), keys, shapes)
    )
    return {"kernel": kernel, "recurrent": recurrent}
