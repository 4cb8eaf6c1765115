"""Rows of rules/library_functions.py."""

import jax

from cases.case import Case, apart, real

F64 = 8

CASES = [
    Case("jax.nn.relu", jax.nn.relu, (apart(2, 3),), at=(((0.0,), {0: 0.0}), ((0.5,), {0: 1.0}))),
    Case("jax.nn.log_softmax", jax.nn.log_softmax, (real(2, 3),), kept=(6 + 2 * 2) * F64),
    Case("jax.nn.log_softmax", lambda x: jax.nn.log_softmax(x, axis=0), (real(2, 3),), "axis 0",
         kept=(6 + 2 * 3) * F64),
]
