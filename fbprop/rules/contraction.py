"""Rules for contractions: matrix products of any dimensions."""

from __future__ import annotations

import numpy as np
from jax import lax

from fbprop.rule import rule


def _free(ndim, *used):
    return [d for d in range(ndim) if not any(d in u for u in used)]


def _dot_general_a(dy, b, *, a_aval, dimension_numbers, precision, preferred_element_type):
    """ā = ȳ contracted with b over b's free dimensions, put back into a's order."""
    (ca, cb), (ba, bb) = dimension_numbers
    n_batch, a_free, b_free = len(ba), _free(len(a_aval.shape), ca, ba), _free(b.ndim, cb, bb)
    dy_b = range(n_batch + len(a_free), dy.ndim)
    out = lax.dot_general(
        dy, b, ((tuple(dy_b), b_free), (tuple(range(n_batch)), bb)), precision=precision,
        preferred_element_type=preferred_element_type,
    )
    # Result dimensions: batch, a's free, then a's contracted in the order in which b has them.
    order = [*ba, *a_free, *np.take(ca, np.argsort(cb)).tolist()]
    return lax.transpose(out, np.argsort(order))


def _dot_general_b(dy, a, *, b_aval, dimension_numbers, precision, preferred_element_type):
    """b̄: the same with the operands' roles exchanged."""
    (ca, cb), (ba, bb) = dimension_numbers
    n_batch, a_free, b_free = len(ba), _free(a.ndim, ca, ba), _free(len(b_aval.shape), cb, bb)
    dy_a = range(n_batch, n_batch + len(a_free))
    out = lax.dot_general(
        dy, a, ((tuple(dy_a), a_free), (tuple(range(n_batch)), ba)), precision=precision,
        preferred_element_type=preferred_element_type,
    )
    order = [*bb, *b_free, *np.take(cb, np.argsort(ca)).tolist()]
    return lax.transpose(out, np.argsort(order))


RULES = [
    rule(
        "dot_general",
        "y = Σ a b over the contracted dimensions;  ā = Σ ȳ b over b's free ones, b̄ = Σ ȳ a over "
        "a's.  Keeps the other operand.",
        a=_dot_general_a, b=_dot_general_b,
    ),
]
