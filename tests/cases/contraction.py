"""Rows of rules/contraction.py."""

import jax.numpy as jnp
from jax import lax

from cases.case import Case, complex_, exactly, real


def dot(contracted, batch=((), ()), **options):
    return lambda a, b: lax.dot_general(a, b, (contracted, batch), **options)


GROUPS = exactly([3, 4], "int32")

CASES = [
    Case("dot_general", jnp.matmul, (real(2, 3), real(3, 5))),
    Case("dot_general", jnp.vdot, (real(5), real(5)), "vectors"),
    Case("dot_general", lambda a: a @ a.T, (real(3, 5),), "twice"),
    Case("dot_general", lambda x, w: x @ w, (real(2, 5, 3), real(3, 7)), "layer"),
    Case("dot_general", lambda x, w: x @ w, (real(2, 2, 5, 3), real(3, 7)), "layer-rank-4"),
    Case("dot_general", jnp.matmul, (real(2, 5, 3), real(2, 3, 7)), "batch"),
    Case("dot_general", dot(((2,), (0,))), (real(2, 3, 5), real(5, 7)), "free-first"),
    Case("dot_general", dot(((0, 2), (3, 1))), (real(2, 3, 5), real(7, 5, 3, 2)), "crossed"),
    Case("dot_general", dot(((0, 2), (2, 0)), ((1,), (1,))), (real(2, 3, 5), real(5, 3, 2)),
         "crossed-batch"),
    Case("dot_general", dot(((3, 1), (1, 2)), ((0,), (3,))),
         (real(2, 3, 7, 5), real(7, 5, 3, 2)), "batch-last"),
    Case("dot_general", dot(((1,), (1,)), ((0, 3), (2, 0))),
         (real(2, 3, 7, 5), real(5, 3, 2, 3)), "two-batches"),
    Case("dot_general", dot(((), ())), (real(2, 3), real(5)), "outer"),
    Case("dot_general", lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k),
         (real(2, 3, 2, 5), real(2, 7, 2, 5)), "attention"),
    Case("dot_general", lambda x, w: jnp.einsum("btd,dhk->bthk", x, w),
         (real(2, 3, 5), real(5, 2, 7)), "heads"),
    Case("dot_general", jnp.matmul, (complex_(2, 3), complex_(3, 5)), "complex",
         dtypes=("float32",)),
    Case("dot_general", dot(((1,), (0,)), precision=lax.Precision.HIGHEST),
         (real(2, 3), real(3, 5)), "precision"),
    Case("dot_general", dot(((1,), (0,)), preferred_element_type=jnp.float64),
         (real(2, 3), real(3, 5)), "preferred"),
    # JAX has neither its second derivative nor a vmap over some of its operands.
    Case("ragged_dot_general", lax.ragged_dot, (real(7, 3), real(2, 3, 5), GROUPS), order=1,
         differences=False),
]
