"""Rows of rules/reduction.py."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from cases.case import Case, apart, complex_, exactly, positive, real


def log_add(a, b):
    """A reducer whose identity is -inf."""
    return jnp.logaddexp(a, b)


def complex_product(x, y):
    """A reduction of pairs: (a, b)(c, d) = (ac − bd, ad + bc)."""

    def reducer(p, q):
        return p[0] * q[0] - p[1] * q[1], p[0] * q[1] + p[1] * q[0]

    return lax.reduce((x, y), (jnp.ones((), x.dtype), jnp.zeros((), y.dtype)), reducer, (1,))


def reduced(reducer, initial, axes):
    return lambda x: lax.reduce(x, jnp.array(initial, x.dtype), reducer, axes)


TIED = np.array([[[1.0, 3.0], [3.0, 3.0]]])

CASES = [
    Case("reduce_sum", lambda x: jnp.sum(x, (0, 2)), (real(2, 3, 5),)),
    Case("reduce_sum", lambda x: jnp.sum(x), (complex_(2, 3),), "complex", dtypes=("float32",)),
    Case("reduce_max", lambda x: jnp.max(x, (2, 0)), (apart(2, 3, 5),),
         at=(((TIED,), {0: [[[0.0, 1.0], [0.5, 0.5]]]}),)),
    Case("reduce_max", lambda x: lax.reduce_max(x, ()), (apart(2, 3),), "no-axes"),
    Case("reduce_min", lambda x: jnp.min(x, 1), (apart(2, 3, 5),),
         at=(((TIED,), {0: [[[1.0, 0.5], [0.0, 0.5]]]}),)),
    Case("reduce_prod", lambda x: jnp.prod(x, (0, 2)), (positive(2, 3, 5),)),
    Case("reduce_prod", lambda x: jnp.prod(x, 1), (exactly([[0.0, 2.0, 3.0], [0.0, 5.0, 0.0]]),),
         "zeros", at=((([[0.0, 2.0, 3.0], [0.0, 5.0, 0.0]],), {0: [[6.0, 0, 0], [0, 0, 0]]}),)),
    Case("reduce_prod", lambda x: jnp.prod(x), (complex_(5),), "complex", dtypes=("float32",)),
    Case("reduce", reduced(log_add, -jnp.inf, (0, 2)), (real(2, 3, 5),)),
    Case("reduce", complex_product, (real(2, 5), real(2, 5)), "pairs"),
]
