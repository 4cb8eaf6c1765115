"""Rows of rules/arithmetic.py."""

import jax
from jax import lax

from cases.case import Case, apart, between, booleans, exactly, integers, positive, real


def add_any(a, b):
    """The sum of cotangents, which only JAX's own backward pass makes: traced from one."""
    return jax.vjp(lambda t: (t, t), a)[1]((a, b))[0]


CASES = [
    Case("add", lax.add, (real(2, 3), real(2, 3))),
    Case("add", lambda a, b: (a + 2.0) * b, (real(2, 3), real(2, 3)), "literal"),
    Case("add_any", add_any, (real(2, 3), real(2, 3))),
    Case("sub", lax.sub, (real(2, 3), real(2, 3))),
    Case("mul", lax.mul, (real(2, 3), real(2, 3))),
    Case("mul", lambda a: lax.mul(a, a), (real(2, 3),), "twice"),
    Case("div", lax.div, (real(2, 3), positive(2, 3))),
    Case("max", lax.max, (apart(2, 3), real(2, 3)),
         at=(((0.5, 0.5), {0: 0.5, 1: 0.5}), ((0.25, 0.5), {0: 0.0, 1: 1.0}))),
    Case("min", lax.min, (apart(2, 3), real(2, 3)),
         at=(((0.5, 0.5), {0: 0.5, 1: 0.5}), ((0.25, 0.5), {0: 1.0, 1: 0.0}))),
    Case("pow", lax.pow, (positive(2, 3), real(2, 3)),
         at=(((0.0, 2.0), {0: 0.0, 1: 0.0}), ((0.0, 1.0), {0: 1.0, 1: 0.0}),
             ((0.0, 0.0), {0: 0.0, 1: 0.0}))),
    Case("rem", lax.rem, (between(3.2, 3.8, 2, 3), exactly([[1.5, -1.5, 0.7], [2.5, -0.9, 1.1]]))),
    Case("atan2", lax.atan2, (real(2, 3), positive(2, 3))),
    Case("integer_pow", lambda x: lax.integer_pow(x, 3), (real(2, 3),)),
    Case("integer_pow", lambda x: lax.integer_pow(x, -2), (positive(2, 3),), "negative"),
    Case("neg", lax.neg, (real(2, 3),)),
    Case("select_n", lax.select_n, (booleans(2, 3), real(2, 3), real(2, 3))),
    Case("select_n", lax.select_n, (integers(0, 3, 5), real(5), real(5), real(5)), "three"),
]
