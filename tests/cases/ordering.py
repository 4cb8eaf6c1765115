"""Rows of rules/ordering.py."""

import jax.numpy as jnp
from jax import lax

from cases.case import Case, apart, between, exactly, integers, positive, real

TIED = [[2.0, 1.0, 2.0, 1.0, 3.0]]


def by_integer_key(keys, x):
    return lax.sort((keys, x), dimension=0, num_keys=1)


def clamped(x):
    return lax.clamp(jnp.array(-0.5, x.dtype), x, jnp.array(0.5, x.dtype))


CASES = [
    Case("sort", lambda x: lax.sort(x, dimension=0), (apart(5, 3),), kept=5 * 3 * 4),
    Case("sort", lambda x: lax.sort(x, dimension=1, is_stable=False), (apart(3, 5),), "unstable",
         kept=3 * 5 * 4),
    Case("sort", lambda x, y: lax.sort((x, y), dimension=1, num_keys=1), (apart(3, 5), real(3, 5)),
         "pairs", kept=3 * 5 * 4),
    Case("sort", lambda x, y: lax.sort((x, y), dimension=0, num_keys=2),
         (exactly([1.0, 0.0, 1.0, 0.0, 1.0]), apart(5)), "keys", kept=5 * 4, differences=False),
    Case("sort", by_integer_key, (integers(0, 3, 5, 2), real(5, 2)), "integers", kept=5 * 2 * 4),
    Case("sort", lambda x: lax.sort(x) * jnp.arange(5, dtype=x.dtype), (exactly(TIED),), "ties",
         kept=5 * 4 + 5 * 8, differences=False, at=(((TIED,), {0: [[2.0, 0.0, 3.0, 1.0, 4.0]]}),)),
    Case("top_k", lambda x: lax.top_k(x, 3), (apart(2, 7),)),
    Case("top_k", lambda x: lax.top_k(x, 2, axis=0), (apart(5, 3),), "axis"),
    Case("top_k", lambda x: lax.top_k(x, 2)[0], ((exactly(TIED)),), "ties", differences=False,
         at=(((TIED,), {0: [[1.0, 0.0, 0.0, 0.0, 1.0]]}),)),
    Case("approx_top_k", lambda x: lax.approx_max_k(x, 3), (apart(2, 7),)),
    Case("approx_top_k", lambda x: lax.approx_min_k(x, 2, reduction_dimension=0), (apart(5, 3),),
         "min"),
    Case("clamp", lax.clamp, (exactly([0.0, 0.0, 0.0, 2.0]), exactly([0.5, -1.0, 3.0, 1.5]),
                              exactly([1.0, 1.0, 1.0, 1.0])),
         at=(((0.0, 0.0, 1.0), {0: 0.0, 1: 0.0, 2: 0.0}),
             ((0.0, 1.0, 1.0), {0: 0.0, 1: 0.0, 2: 0.0}),
             ((0.0, 2.0, 1.0), {0: 0.0, 1: 0.0, 2: 1.0}))),
    Case("clamp", clamped, (apart(5, 3),), "scalars", at=(((0.5,), {0: 0.0}), ((0.0,), {0: 1.0}))),
    Case("clamp", lax.clamp, (between(-0.4, 0, 2, 3), apart(2, 3), positive(2, 3)), "arrays"),
]
