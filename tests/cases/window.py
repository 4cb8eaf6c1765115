"""Rows of rules/window.py."""

import jax
import numpy as np
from jax import lax

from cases.case import Case, apart, exactly, real

REDUCERS = {"max": (-np.inf, lax.max), "min": (np.inf, lax.min), "sum": (0.0, lax.add)}


def window(name, *where, **options):
    """x -> `lax.reduce_window` of it, by "max", "min" or "sum"."""
    start, reducer = REDUCERS[name]
    return lambda x: lax.reduce_window(x, np.asarray(start, x.dtype), reducer, *where, **options)


def extremum(name, label, x, kept, *where, **options):
    fun = window(name, *where, **options)
    return Case(f"reduce_window_{name}", fun, (x,), label, kept=kept)


def total(label, shape, *arguments, **options):
    fun = window("sum", *arguments, **options)
    return Case("reduce_window_sum", fun, (real(*shape),), label, evaluated=False)


def scattered(name, x, *where):
    """s -> what JAX's own pullback of the extremum at x makes of s."""
    return lambda s: jax.vjp(window(name, *where), x.astype(s.dtype))[1](s)[0]


def gathered(label, name, x, *where):
    """t -> what JAX's own derivative of the extremum at x makes of t."""
    fun = lambda t: jax.jvp(window(name, *where), (x.astype(t.dtype),), (t,))[1]
    return Case("select_and_gather_add", fun, (real(*x.shape),), label, evaluated=False)


IMAGE, PLANE = apart(2, 7, 5, 3), apart(2, 5, 7)
SOME, FLAT = (spec(np.random.default_rng(1)) for spec in (IMAGE, PLANE))
TWO, THREE = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID"), ((1, 3, 3, 1), (1, 2, 2, 1), "SAME")
TIES = exactly([[2.0, 2.0, 0.0, 0.0, 0.0, 1.0, 1.0]])
PAIRS = ((1, 2), (1, 2), "VALID")
LARGE = ((1, 7, 6), (1, 1, 1), ((0, 0), (6, 2), (3, 2)))

CASES = [
    extremum("max", "2x2", IMAGE, 2 * 3 * 2 * 3, *TWO),
    extremum("max", "3x3", IMAGE, 2 * 4 * 3 * 3, *THREE),
    extremum("min", "3x3", IMAGE, 2 * 4 * 3 * 3, *THREE),
    extremum("max", "NCHW", apart(2, 3, 7, 5), 2 * 3 * 5 * 2, (1, 1, 3, 2), (1, 1, 1, 2), "VALID"),
    extremum("min", "apart", apart(2, 7), 2 * 3, (1, 2), (1, 3), ((0, 0), (1, 0))),
    extremum("max", "1-D", apart(7), 5, (3,), (1,), "VALID"),
    extremum("max", "3-D", apart(3, 5, 2), 2 * 2 * 2, (2, 3, 1), (1, 2, 1), "VALID"),
    extremum(
        "max", "dilated operand", apart(3, 5), 4 * 9, (3, 2), (2, 1), ((2, 1), (1, 0)),
        base_dilation=(3, 2),
    ),
    # 42 offsets, all blocks of stride 1: the forms for large windows.
    extremum("max", "large", PLANE, 2 * 7 * 7, *LARGE),
    extremum("min", "global", PLANE, 2, (1, 5, 7), (1, 1, 1), "VALID"),
    extremum("max", "int16 codes", apart(131), 2, (131,), (131,), "VALID"),
    Case(
        "reduce_window_max", window("max", *PAIRS), (TIES,), "ties", differences=False, kept=3,
        at=((([[2.0, 2.0, 0.0, 0.0, 0.0, 1.0, 1.0]],), {0: [[1.0, 0, 1.0, 0, 0, 1.0, 0]]}),),
    ),
    Case(
        "reduce_window_min", window("min", *PAIRS), (TIES,), "ties", differences=False, kept=3,
        at=((([[2.0, 2.0, 0.0, 0.0, 0.0, 1.0, 1.0]],), {0: [[1.0, 0, 1.0, 0, 1.0, 0, 0]]}),),
    ),
    # Where all a window sees is −∞, its first offset wins, be it padding, as in XLA.
    Case(
        "reduce_window_max", window("max", (2,), (2,), ((1, 0),)), (apart(5),), "infinite", kept=3,
        at=(((np.asarray([-np.inf, -np.inf, -np.inf, 1.0, -np.inf]),), {0: [0, 1.0, 0, 1.0, 0]}),),
    ),
    total("2x2", (2, 7, 5, 3), *TWO),
    total("3x3", (2, 7, 5, 3), *THREE),
    total("NCHW", (2, 3, 7, 5), (1, 1, 3, 2), (1, 1, 1, 2), ((0, 0), (0, 0), (1, 2), (-1, 1))),
    total(
        "dilated", (2, 7, 5), (1, 3, 2), (1, 2, 1), ((0, 1), (2, 0), (1, 1)),
        base_dilation=(1, 2, 3), window_dilation=(1, 2, 3),
    ),
    total("large", (2, 5, 7), *LARGE),
    total("running", (37,), (37,), (1,), ((36, 0),)),
    # The result is linear in the first operand and does not depend on the other, differentiably.
    Case("select_and_scatter_add", scattered("max", SOME, *THREE), (real(2, 4, 3, 3),), "max"),
    Case("select_and_scatter_add", scattered("min", SOME, *TWO), (real(2, 3, 2, 3),), "min"),
    Case("select_and_scatter_add", scattered("max", FLAT, *LARGE), (real(2, 7, 7),), "large"),
    gathered("max", "max", SOME, *THREE), gathered("min", "min", SOME, *TWO),
    gathered("large", "max", FLAT, *LARGE),
]
