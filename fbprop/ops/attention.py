"""Attention without the [T, S] shares; the mathematics is in `fbprop.rules.attention`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from fbprop.core.devices import own_broadcasting
from fbprop.ops.arguments import one_key
from fbprop.rules.attend import attend, plain
from fbprop.rules.attention import ROWS, Form


def attention(q, k, v, *, causal: bool = False, mask=None, bias=None,
              window: int | tuple[int, int] | None = None, scale: float | None = None,
              dropout: float = 0.0, key=None, lengths=None):
    """y = softmax(q kᵀ · scale + bias) v over the keys that each query sees.

    | kept | shape | instead of |
    |---|---|---|
    | q, k, v, y | as given | the same |
    | log-sum-exp, float32 | [B, H, T] | shares and scores, [B, H, T, S] each |

    v̄ = Pᵀ ȳ, S̄ = P (ȳ vᵀ − Σ ȳ y), q̄ = S̄ k · scale, k̄ = S̄ᵀ q · scale, bias̄ = S̄, with shares P made
    again from the log-sum-exp, a block of queries at a time (Dao et al. 2022). On one CUDA device
    16-bit attention without mask, bias, lengths or dropout is cuDNN's, on one TPU the Pallas kernel
    that comes with JAX where its conditions hold; `fbprop.explain` says which, and why not. Of 64
    queries and keys or fewer the plain code is faster, and taken; it keeps the shares.

    Products of 16-bit numbers add up in float32. Forward mode is that of the blocks.

    Args:
      q: [B, T, H, D], or [T, H, D].
      k, v: [B, S, K, D] and [B, S, K, E], K a divisor of H: each head of keys serves H / K
        consecutive heads of queries (Ainslie et al. 2023). All of one floating dtype.
      causal: query t sees keys 0..t.
      mask: bool, broadcasts to [B, H, T, S]; where it is False a key is not seen.
      bias: added to the scores, broadcasts to [B, H, T, S]; a key of −inf is not seen.
      window: query t sees keys t − left .. t + right of ``(left, right)``; one number is for both.
      scale: of the scores; by default 1 / sqrt(D).
      dropout: probability in [0, 1) with which a share is left out; key: then a JAX key.
      lengths: how many keys are real, [B] integers; with T = S also how many queries. Or
        ``(of queries, of keys)``, each None or [B]. What is beyond is padding: it is not read, its
        y and gradients are 0.

    Returns:
      [B, T, H, E] in q's dtype. A query that sees no key gets 0, and gradient 0.

    Raises:
      TypeError: types that do not fit.   ValueError: shapes or numbers that do not.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import ops
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
      >>> ops.attention(q, k, v, causal=True).shape
      (2, 5, 4, 8)
    """
    q, k, v = (jnp.asarray(a) for a in (q, k, v))
    if q.ndim == 3:
        more = {"mask": mask, "bias": bias, "lengths": lengths}
        if lengths is not None:
            more["lengths"] = jax.tree.map(lambda n: jnp.asarray(n)[None], lengths)
        return attention(q[None], k[None], v[None], causal=causal, window=window, scale=scale,
                         dropout=dropout, key=key, **more)[0]
    _check(q, k, v, dropout, key)
    batch, steps, heads, size = q.shape
    groups = heads // max(k.shape[2], 1)
    window = _both_sides(window)
    full = (batch, heads, steps, k.shape[1])
    mask, bias = (_by_group(n, a, full, groups) for n, a in (("mask", mask), ("bias", bias)))
    seed = _seed(key, batch, k.shape[2]) if dropout else None
    real = _real(lengths, steps, k.shape[1], batch)
    scale = 1 / math.sqrt(max(size, 1)) if scale is None else float(scale)
    form = Form(scale, bool(causal), window, float(dropout))
    short = max(steps, k.shape[1]) <= ROWS and not dropout
    grouped = q.reshape(batch, steps, k.shape[2], groups, size)
    with own_broadcasting():
        y = (plain if short else attend)(grouped, k, v, bias, mask, real, seed, form=form)
    return y.reshape(batch, steps, heads, v.shape[3])


def _check(q, k, v, dropout, key):
    if any(a.ndim != 4 for a in (q, k, v)) or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "attention takes q [B, T, H, D], k [B, S, K, D] and v [B, S, K, E], got "
            f"{q.shape}, {k.shape} and {v.shape}: split the last dimension into heads."
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q and k are of the same examples and as many features per head, got "
            f"{q.shape} and {k.shape} expected equal first and last dimensions."
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"Heads of keys serve equally many heads of queries each, got {q.shape[2]} heads of "
            f"queries expected a multiple of {k.shape[2]}."
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(
            "attention takes q, k and v of one floating dtype, got "
            f"{q.dtype.name}, {k.dtype.name} and {v.dtype.name}: cast them."
        )
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(
            f"dropout is a probability, got {dropout!r} expected a number in [0, 1)."
        )
    if dropout and key is None:
        raise ValueError(
            f"attention with dropout={dropout} draws what is left out, got key=None expected a "
            "JAX key: pass key=jax.random.key(...), another one at each step."
        )


def _both_sides(window):
    """How many keys a query sees to its left and to its right, or None."""
    if window is None:
        return None
    sides = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    if len(sides) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 0 for n in sides):
        raise ValueError(
            "window is how many keys a query sees to its left and right, got "
            f"{window!r} expected two whole numbers from 0 on."
        )
    return tuple(map(int, sides))


def _by_group(name, array, full, groups):
    """Of [B, H, T, S] or what broadcasts to it: [B, K, T, G, S], dimensions of 1 as they are."""
    if array is None:
        return None
    array = jnp.asarray(array)
    right = array.dtype == bool if name == "mask" else jnp.issubdtype(array.dtype, jnp.floating)
    if not right:
        kind = "bool, True where a key is seen" if name == "mask" else "floating"
        raise TypeError(f"{name} has dtype {array.dtype.name}, expected {kind}.")
    if array.ndim > 4 or any(n not in (1, m) for n, m in zip(array.shape[::-1], full[::-1])):
        raise ValueError(
            f"{name} broadcasts to [B, H, T, S], got shape {array.shape} expected dimensions of "
            f"{full} or 1."
        )
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    b, h, t, s = array.shape
    heads = (h // groups, groups) if h == full[1] else (1, 1)
    return array.reshape(b, *heads, t, s).swapaxes(2, 3)


def _real(lengths, queries, keys, batch):
    """How many queries and keys exist, [B, 1, 2]."""
    if lengths is None:
        return None
    pair = lengths if isinstance(lengths, tuple) else (
        lengths if queries == keys else None, lengths)
    numbers = []
    for given, most in zip(pair, (queries, keys)):
        n = jnp.full((batch,), most, jnp.int32) if given is None else jnp.asarray(given)
        if n.shape != (batch,) or not jnp.issubdtype(n.dtype, jnp.integer):
            raise ValueError(
                "lengths are one integer per example, got "
                f"{n.dtype.name}{list(n.shape)} expected int32[{batch}], or a pair of those."
            )
        numbers.append(n.astype(jnp.int32))
    return jnp.stack(numbers, -1)[:, None]


def _seed(key, batch, heads):
    """A seed for each example and head of keys."""
    keys = jax.random.split(one_key("attention", key), batch * heads)
    return jax.random.key_data(keys).reshape(batch, heads, -1)
