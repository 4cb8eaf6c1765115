"""Attention by blocks of queries: forward and backward in plain array code, for every platform.

    S = q kᵀ · scale + bias,  P = softmax(S) over the keys that a query sees,  y = P v
    v̄ = Pᵀ ȳ,  S̄ = P (ȳ vᵀ − Σ ȳ y),  q̄ = S̄ k · scale,  k̄ = S̄ᵀ q · scale,  bias̄ = S̄

Kept are q, k, v, y and per query the log-sum-exp of S: P is computed again from it, a block of
queries at a time, and only for keys that a query of the block may see (Dao et al. 2022,
FlashAttention). No array of [T, S] exists. The mathematics is of one head of keys and the G heads
of queries that share it; `fbprop.rules.heads` does it for all.

Letters: B batch, T queries, S keys, K heads of keys, G heads of queries for each, D, E features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core.precision import wide_dtype

ROWS = 64  # queries in a block at least: products of fewer are too thin for a CPU


class Form(NamedTuple):
    """What is static about an attention.

    Attributes:
      scale: of the scores.
      causal: whether query t sees keys 0..t only.
      window: query t sees keys t − window[0] .. t + window[1] only; None: all.
      dropout: probability with which a share is left out.
    """

    scale: float
    causal: bool = False
    window: tuple[int, int] | None = None
    dropout: float = 0.0


class Operands(NamedTuple):
    """Arrays of all heads, and below of one; the last four may be None.

    q: [B, T, K, G, D], of one head [T, G, D].   k: [B, S, K, D], [S, D].   v: [B, S, K, E], [S, E].
    bias, mask (bool): [B, K, T, G, S], [T, G, S]; each dimension may be 1.
    real: [B, 1, 2], [2]; how many queries and how many keys exist, the others are padding.
    seed: [B, K, 2], [2]; uint32, of what dropout leaves out.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    real: jax.Array | None = None
    seed: jax.Array | None = None


# Where batch and head of keys stand among the dimensions of operands of all heads.
DIMS = Operands((0, 2), (0, 2), (0, 2), (0, 1), (0, 1), (0, 1), (0, 1))


class Block(NamedTuple):
    """Queries t0..t1, and the keys s0..s1 that one of them may see."""

    t0: int
    t1: int
    s0: int
    s1: int

    def of(self, array):
        """The block's part of an array [T or 1, G or 1, S or 1]."""
        return array[self.index(array)]

    def index(self, array):
        whole = slice(None)
        return (slice(self.t0, self.t1) if array.shape[0] > 1 else whole, whole,
                slice(self.s0, self.s1) if array.shape[2] > 1 else whole)


class Laid(NamedTuple):
    """How a block's scores stand in a matrix: [t · G, s], or with ``keys_first`` [s, G · t]."""

    steps: int
    group: int
    keys_first: bool = False

    def scores(self, array):
        """What broadcasts to [t, G, s] as what does to the matrix."""
        full = (self.steps, self.group, array.shape[2])
        if not self.keys_first:
            return _rows(jnp.broadcast_to(array, full))
        array = jnp.broadcast_to(array.transpose(2, 1, 0), full[::-1])
        return array.reshape(full[2], full[1] * full[0])

    def queries(self, array):
        """[t, G, n] as a matrix of rows in the order of the scores'."""
        return _rows(array.swapaxes(0, 1) if self.keys_first else array)

    def apart(self, matrix):
        """Such a matrix as [t, G, n]."""
        if self.keys_first:
            return matrix.reshape(self.group, self.steps, matrix.shape[1]).swapaxes(0, 1)
        return matrix.reshape(self.steps, self.group, matrix.shape[1])

    def product(self, queries, keys):
        """Of every query's row and every key's."""
        return product(*((keys, queries) if self.keys_first else (queries, keys)), 1, 1)


def blocks(form: Form, queries: int, keys: int, most: int) -> list[Block]:
    """At most ``most`` blocks, of a multiple of `ROWS` queries each."""
    rows = ROWS * max(1, math.ceil(queries / (ROWS * most)))
    left, right = form.window or (queries, keys)
    right = 0 if form.causal else right
    ends = [(t0, min(t0 + rows, queries)) for t0 in range(0, queries, rows)]
    return [
        Block(t0, t1, min(max(0, t0 - left), keys), min(keys, t1 + right)) for t0, t1 in ends
    ]


def forward(form: Form, x: Operands, most: int):
    """y [T, G, E] in v's type and the log-sum-exp of the scores [T, G].

    Where a query sees nothing, these are 0 and +inf.
    """
    x = without_padding(x)
    ys, lses = [], []
    for b in blocks(form, len(x.q), len(x.k), most):
        laid = Laid(b.t1 - b.t0, x.q.shape[1])
        scores = _scores(form, x, b, laid)
        top = jnp.max(scores, -1, keepdims=True, initial=-jnp.inf)
        top = jnp.where(jnp.isneginf(top), 0, top)
        shares = jnp.exp(scores - top)
        total = jnp.sum(shares, -1, keepdims=True)
        lse = jnp.where(total == 0, jnp.inf, top + jnp.log(total))
        shares = _dropped(form, x, b, laid, shares).astype(x.v.dtype)
        y = product(shares, x.v[b.s0:b.s1], 1, 0)
        ys.append(laid.apart((y / jnp.where(total == 0, 1, total)).astype(x.v.dtype)))
        lses.append(laid.apart(lse)[..., 0])
    if not ys:
        return jnp.zeros((*x.q.shape[:2], x.v.shape[1]), x.v.dtype), jnp.zeros(
            x.q.shape[:2], wide_dtype(x.q.dtype))
    return jnp.concatenate(ys), jnp.concatenate(lses)


def backward(form: Form, x: Operands, y, lse, dy, bias_wanted: bool, most: int, keys_first: bool):
    """Cotangents of q, k, v, and of bias if wanted: a list.

    With ``keys_first`` two of the three products of scores take them as they stand, else one of
    them: on a CPU B4 H8 T1024 D64 takes 0.9 of the time so, on an H100 1.5 of the memory. (Forward
    the one product takes rows of queries: 1.2 of a CPU's time with keys first.)
    """
    x, kind = without_padding(x), x.q.dtype
    if x.real is not None:
        dy = jnp.where((count(len(x.q)) < x.real[0])[:, None, None], dy, 0)
    along = jnp.sum(dy.astype(lse.dtype) * y.astype(lse.dtype), -1)
    dk, dv = jnp.zeros(x.k.shape, wide_dtype(kind)), jnp.zeros(x.v.shape, wide_dtype(kind))
    dqs, dbias = [], jnp.zeros(x.bias.shape, wide_dtype(kind)) if bias_wanted else None
    over = (1, 0) if keys_first else (0, 1)  # where queries and keys stand in the scores
    for b in blocks(form, len(x.q), len(x.k), most):
        rows, keys = slice(b.t0, b.t1), slice(b.s0, b.s1)
        laid = Laid(b.t1 - b.t0, x.q.shape[1], keys_first)
        q, k, dyb = laid.queries(x.q[rows]), x.k[keys], laid.queries(dy[rows])
        shares = jnp.exp(_scores(form, x, b, laid) - laid.scores(lse[rows, :, None]))
        dshares = laid.product(dyb, x.v[keys])
        given, dshares = (_dropped(form, x, b, laid, a) for a in (shares, dshares))
        dscores = shares * (dshares - laid.scores(along[rows, :, None]))
        if bias_wanted:
            at, of_queries = b.index(dbias), laid.apart(dscores.T if keys_first else dscores)
            dbias = dbias.at[at].add(summed_to(of_queries, dbias[at].shape))
        dscores = (dscores * form.scale).astype(kind)
        dqs.append(laid.apart(product(dscores, k, over[1], 0).astype(kind)))
        dk = dk.at[keys].add(product(dscores, q, over[0], 0))
        dv = dv.at[keys].add(product(given.astype(kind), dyb, over[0], 0))
    dq = jnp.concatenate(dqs) if dqs else jnp.zeros_like(x.q)
    dbias = [dbias.astype(x.bias.dtype)] if bias_wanted else []
    return [dq, dk.astype(x.k.dtype), dv.astype(x.v.dtype), *dbias]


def count(*limits):
    """`jnp.arange` in int32, as lengths are."""
    return jnp.arange(*limits, dtype=jnp.int32)


def product(a, b, i, j):
    """Of matrices, over dimension i of a and j of b; summed in float32 at least."""
    over, kind = (((i,), (j,)), ((), ())), wide_dtype(a.dtype)
    return lax.dot_general(a, b, over, preferred_element_type=kind)


def summed_to(x, shape):
    """Summed over the dimensions in which ``shape`` is 1."""
    return jnp.sum(x, [i for i, n in enumerate(shape) if n == 1], keepdims=True)


def without_padding(x: Operands) -> Operands:
    """Of one head: 0 where padding was. What does not count is not read, be it nan."""
    if x.real is None:
        return x
    t, s = count(len(x.q)) < x.real[0], count(len(x.k)) < x.real[1]
    k, v = (jnp.where(s[:, None], a, 0) for a in (x.k, x.v))
    return x._replace(q=jnp.where(t[:, None, None], x.q, 0), k=k, v=v)


def _rows(array):
    """[t, G, n] as a matrix of t · G rows."""
    return array.reshape(array.shape[0] * array.shape[1], array.shape[2])


def _scores(form, x, b, laid):
    """S of a block, -inf where a key is not seen."""
    scores = laid.product(laid.queries(x.q[b.t0:b.t1]), x.k[b.s0:b.s1])
    scores = scores * form.scale
    if x.bias is not None:
        scores = scores + laid.scores(b.of(x.bias)).astype(scores.dtype)
    for seen in _seen(form, x, b, laid):
        scores = jnp.where(seen, scores, -jnp.inf)
    return scores


def _seen(form, x, b, laid):
    """Which keys the queries of a block see: arrays that broadcast to its scores."""
    t = laid.scores(count(b.t0, b.t1)[:, None, None])
    s = laid.scores(count(b.s0, b.s1)[None, None])
    left, right = form.window or (None, None)
    if form.causal and b.s1 > b.t0 + 1:
        yield s <= t
    elif right is not None and b.s1 > b.t0 + 1 + right:
        yield s <= t + right
    if left is not None and b.s0 < b.t1 - 1 - left:
        yield s >= t - left
    if x.mask is not None:
        yield laid.scores(b.of(x.mask))
    if x.real is not None:
        yield (t < x.real[0]) & (s < x.real[1])


def _dropped(form, x, b, laid, shares):
    """What dropout leaves of a block's shares, the same at every call."""
    if not form.dropout:
        return shares
    key = jax.random.fold_in(jax.random.wrap_key_data(x.seed), b.t0)
    shape = (laid.steps, laid.group, b.s1 - b.s0)
    stays = laid.scores(jax.random.bernoulli(key, 1 - form.dropout, shape))
    return jnp.where(stays, shares / (1 - form.dropout), 0)
