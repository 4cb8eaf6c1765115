"""Rows of rules/special.py."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from cases.case import Case, between, exactly, positive, real

INF = math.inf


def samples(log_space):
    """The primitive itself; `jax.random.gamma` has a jit around it."""
    return lambda a: primitives.random_gamma_p.bind(jax.random.key(0), a, log_space=log_space)


def same(x, value):
    """A constant that takes no part in the differentiation."""
    return jnp.full_like(x, value)


CASES = [
    Case("erf", lax.erf, (real(2, 3),)),
    Case("erfc", lax.erfc, (real(2, 3),)),
    Case("erf_inv", lax.erf_inv, (between(-0.9, 0.9, 2, 3),),
         at=(((1.0,), {0: INF}), ((-1.0,), {0: INF}))),
    Case("lgamma", lax.lgamma, (positive(2, 3),)),
    Case("lgamma", lax.lgamma, (exactly([-0.5, -1.3, -2.6]),), "negative"),
    Case("digamma", lax.digamma, (positive(2, 3),)),
    Case("polygamma", lambda x: lax.polygamma(same(x, 2.0), x), (positive(2, 3),)),
    Case("igamma", lambda x: lax.igamma(same(x, 1.5), x), (positive(2, 3),), "x"),
    Case("igamma", lax.igamma, (positive(2, 3), positive(2, 3)), order=1),
    Case("igammac", lambda x: lax.igammac(same(x, 1.5), x), (positive(2, 3),), "x"),
    Case("igammac", lax.igammac, (positive(2, 3), positive(2, 3)), order=1),
    Case("regularized_incomplete_beta", lambda x: lax.betainc(same(x, 1.5), same(x, 2.5), x),
         (between(0.1, 0.9, 2, 3),)),
    Case("bessel_i0e", lax.bessel_i0e, (exactly([[0.5, -0.25, 2.0], [-3.0, 1.5, 1.0]]),),
         at=(((0.0,), {0: 0.0}),)),
    Case("bessel_i1e", lax.bessel_i1e, (exactly([[0.5, -0.25, 2.0], [-3.0, 0.125, 1.0]]),),
         at=(((0.0,), {0: 0.5}),)),
    # Neighbouring parameters accept other draws, and other precisions draw other bits: only the
    # derivative of the quantile, which JAX defines, is comparable, and only in one precision.
    Case("random_gamma", samples(False), (positive(2, 3),), order=1, differences=False, dtypes=()),
    Case("random_gamma", samples(True), (positive(2, 3),), "log", order=1, differences=False,
         dtypes=()),
]
