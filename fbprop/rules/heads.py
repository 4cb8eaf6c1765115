"""A function of one head's arrays for all examples and heads: at once, or one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def all_heads(run, arrays, dims, results):
    """At once.

    Args:
      run: arrays of one head -> a list of arrays; None stays None.
      arrays: of all heads; what stands for all examples, or all heads, has a dimension of 1 there.
      dims: per array, where its dimensions of examples and heads are.
      results: the same per result: (shape of all heads', dimensions).
    """
    first = [None if a is None else jnp.moveaxis(a, d, (0, 1)) for a, d in zip(arrays, dims)]
    full = first[0].shape[:2]
    shared = [[a is not None and a.shape[i] != full[i] for a in first] for i in (0, 1)]
    first = [a if a is None else lax.squeeze(a, [i for i in (0, 1) if shared[i][n]])
             for n, a in enumerate(first)]
    mapped = run
    for alone in reversed(shared):
        axes = [None if a is None or s else 0 for a, s in zip(first, alone)]
        mapped = jax.vmap(mapped, in_axes=axes)
    outs = []
    for y, (shape, d) in zip(mapped(*first), results):
        y = jnp.moveaxis(y, (0, 1), d)
        over = [i for i in d if shape[i] != y.shape[i]]
        outs.append(jnp.sum(y, over, keepdims=True, dtype=y.dtype) if over else y)
    return outs


def by_heads(run, arrays, dims, results):
    """One after the other, each result into its place. On a CPU a head's scores stay in the cache:
    causal, B4 H8 T1024 D64 take half of the time, and 0.02 of the memory in the place of 0.85.
    """
    batch, heads = (arrays[0].shape[d] for d in dims[0])

    def body(i, carry):
        at = (i // heads, i % heads)
        one = [None if a is None else _take(a, d, at) for a, d in zip(arrays, dims)]
        return [_put(total, part, d, at) for total, part, (_, d) in zip(carry, run(*one), results)]

    one = [None if a is None else _take(a, d, (0, 0)) for a, d in zip(arrays, dims)]
    types = jax.eval_shape(run, *one)
    zeros = [jnp.zeros(shape, t.dtype) for (shape, _), t in zip(results, types)]
    return lax.fori_loop(0, batch * heads, body, zeros)


def _start(shape, dims, at):
    where = dict(zip(dims, at))
    return [where.get(i, 0) if n > 1 else 0 for i, n in enumerate(shape)]


def _take(array, dims, at):
    sizes = [1 if i in dims else n for i, n in enumerate(array.shape)]
    return lax.squeeze(lax.dynamic_slice(array, _start(array.shape, dims, at), sizes), dims)


def _put(total, part, dims, at):
    start, part = _start(total.shape, dims, at), jnp.expand_dims(part, dims)
    if any(total.shape[d] == 1 for d in dims):  # shared: summed
        part = part + lax.dynamic_slice(total, start, part.shape)
    return lax.dynamic_update_slice(total, part, start)
