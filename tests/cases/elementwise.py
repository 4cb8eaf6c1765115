"""Rows of rules/elementwise.py."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from cases.case import Case, apart, between, complex_, exactly, positive, real

NEWER = jax.__version_info__ >= (0, 12)  # has log2, one_minus_square, polynomial; see below
SINGLE = ("float32",)  # complex operands have one lower precision
HIGHEST = lax.AccuracyMode.HIGHEST
INF = math.inf


def unary(name, fun, operand, *complex_too, at=()):
    """A row on real operands and, for functions of complex numbers, one on complex operands."""
    rows = [Case(name, fun, (operand,), at=at)]
    return rows + [Case(name, fun, (z,), "complex", dtypes=SINGLE) for z in complex_too]


def right_half(*shape):
    """Complex numbers with a real part in [1.5, 2)."""
    return lambda rng: rng.uniform(1.5, 2, shape) + 1j * rng.standard_normal(shape)


def newer():
    """Rows of primitives, and of derivatives, that jax 0.10 does not have."""
    return [
        *unary("log2", lax.log2, positive(2, 3), complex_(2, 3)),
        *unary("one_minus_square", lax.one_minus_square, real(2, 3), complex_(2, 3)),
        Case("polynomial", lambda x, a, b, c: lax.polynomial(x, [a, b, c]),
             (real(2, 3), real(2, 3), real(2, 3), real(2, 3))),
        Case("polynomial", lambda x: lax.polynomial(x, [1.0, -2.0, 0.5, x]), (real(2, 3),),
             "literals"),
        Case("polynomial", lambda c: lax.polynomial(jnp.ones_like(c) * 0.5, [c, c, 2.0]),
             (real(2, 3),), "coefficients"),
        Case("nextafter", lambda x: lax.nextafter(x, jnp.ones_like(x)), (real(2, 3),)),
        Case("sign", lax.sign, (complex_(2, 3),), dtypes=SINGLE,
             at=(((0j,), {0: 0j}),)),
        Case("acosh", lax.acosh, (complex_(2, 3),), "left half plane", dtypes=SINGLE),
    ]


CASES = [
    *unary("exp", lax.exp, real(2, 3), complex_(2, 3)),
    *unary("exp2", lax.exp2, real(2, 3), complex_(2, 3)),
    *unary("expm1", lax.expm1, real(2, 3), complex_(2, 3), at=(((0.0,), {0: 1.0}),)),
    Case("expm1", lambda x: lax.expm1(x, accuracy=HIGHEST), (real(2, 3),), "highest"),
    *unary("log", lax.log, positive(2, 3), complex_(2, 3), at=(((0.0,), {0: INF}),)),
    *unary("log1p", lax.log1p, positive(2, 3), complex_(2, 3), at=(((-1.0,), {0: INF}),)),
    *unary("tanh", lax.tanh, real(2, 3), complex_(2, 3),
           at=(((0.0,), {0: 1.0}), ((INF,), {0: 0.0}))),
    Case("tanh", lambda x: lax.tanh(x, accuracy=HIGHEST), (real(2, 3, scale=3),), "highest"),
    *unary("logistic", lax.logistic, real(2, 3), complex_(2, 3),
           at=(((0.0,), {0: 0.25}), ((INF,), {0: 0.0}), ((-INF,), {0: 0.0}))),
    Case("logistic", lambda x: lax.logistic(x, accuracy=HIGHEST), (real(2, 3, scale=5),),
         "highest"),
    *unary("sin", lax.sin, real(2, 3), complex_(2, 3)),
    *unary("cos", lax.cos, real(2, 3), complex_(2, 3)),
    *unary("tan", lax.tan, between(-1, 1, 2, 3), complex_(2, 3)),
    *unary("asin", lax.asin, between(-0.9, 0.9, 2, 3), complex_(2, 3),
           at=(((1.0,), {0: INF}), ((-1.0,), {0: INF}))),
    *unary("acos", lax.acos, between(-0.9, 0.9, 2, 3), complex_(2, 3),
           at=(((1.0,), {0: -INF}), ((-1.0,), {0: -INF}))),
    *unary("atan", lax.atan, real(2, 3), complex_(2, 3)),
    *unary("sinh", lax.sinh, real(2, 3), complex_(2, 3)),
    *unary("cosh", lax.cosh, real(2, 3), complex_(2, 3)),
    *unary("asinh", lax.asinh, real(2, 3), complex_(2, 3),
           at=(((0.0,), {0: 1.0}), ((INF,), {0: 0.0}))),
    *unary("acosh", lax.acosh, between(1.5, 3, 2, 3), right_half(2, 3), at=(((1.0,), {0: INF}),)),
    *unary("atanh", lax.atanh, between(-0.9, 0.9, 2, 3), complex_(2, 3),
           at=(((1.0,), {0: INF}), ((-1.0,), {0: INF}))),
    *unary("sqrt", lax.sqrt, positive(2, 3), complex_(2, 3), at=(((0.0,), {0: INF}),)),
    *unary("rsqrt", lax.rsqrt, positive(2, 3), complex_(2, 3),
           at=(((0.0,), {0: -INF}), ((INF,), {0: 0.0}))),
    *unary("cbrt", lax.cbrt, positive(2, 3), at=(((0.0,), {0: INF}),)),
    Case("cbrt", lax.cbrt, (exactly([-0.5, 0.7, -2.0]),), "negative"),
    *unary("square", lax.square, real(2, 3), complex_(2, 3)),
    *unary("abs", lax.abs, apart(2, 3), complex_(2, 3),
           at=(((0.0,), {0: 1.0}), ((0j,), {0: 0j}))),
    Case("convert_element_type", lambda x: lax.convert_element_type(x, jnp.float32) * 2,
         (exactly([0.5, -1.25, 3.0]),), "narrower", differences=False),
    Case("convert_element_type", lambda x: lax.convert_element_type(x, jnp.complex128) * 2j,
         (real(2, 3),), "complex", dtypes=SINGLE),
    Case("copy", lambda x: jnp.copy(x) * 2.0, (real(2, 3),)),
    *(newer() if NEWER else ()),
]
