"""Rules for special functions: error, gamma, beta and Bessel functions, and gamma samples.

Formulas: NIST Digital Library of Mathematical Functions, https://dlmf.nist.gov (sections in the
rules' lines).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core.rule import broadcasting, elementwise, rule
from fbprop.rules.elementwise import vanishing

TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)


def _no_derivative(function, operand):
    """A pullback for an operand in which JAX has no derivative either."""

    def pullback(dy):
        raise NotImplementedError(
            f"{function} has a derivative in its last operand only, got one asked for in "
            f"{operand!r} expected it to be constant: wrap it in jax.lax.stop_gradient."
        )

    return pullback


def _times_log(n, x):
    """n ln x; 0 where n = 0 and x = 0, as x⁰ = 1."""
    return n * lax.log(jnp.where((n == 0) & (x == 0), 1, x))


def _times_log1p(n, x):
    """n ln(1 + x); 0 where n = 0 and x = −1."""
    return n * lax.log1p(jnp.where((n == 0) & (x == -1), 0, x))


def _igamma_a(dy, a, x):
    """By the series; P(a, ∞) = 1 for every a."""
    far = x == jnp.inf
    return dy * jnp.where(far, 0, lax.igamma_grad_a(a, jnp.where(far, 1, x)))


def _igamma_x(dy, a, x):
    """ȳ x^(a−1) e^(−x) / Γ(a), formed from logarithms because Γ overflows at a = 172 in float64."""
    finite = jnp.where(x == jnp.inf, 0, x)
    slope = lax.exp(_times_log(a - 1, finite) - finite - lax.lgamma(a))
    return dy * jnp.where(x == jnp.inf, 0, slope)


def _betainc_x(dy, a, b, x):
    log_beta = lax.lgamma(a) + lax.lgamma(b) - lax.lgamma(a + b)
    return dy * lax.exp(_times_log(a - 1, x) + _times_log1p(b - 1, -x) - log_beta)


def _i1e(dy, x, out):
    """Near 0 the formula is 1 − y/x with y/x → 1/2: there the limit stands in for it."""
    eps = jnp.finfo(x.dtype).eps
    regular = lax.abs(x) > eps
    safe = jnp.where(regular, x, eps)
    slope = lax.bessel_i0e(safe) - out * (lax.sign(safe) + 1 / safe)
    return dy * jnp.where(regular, slope, 0.5)


def _random_gamma(dy, a, out, *, log_space):
    """ȳ ds/da; for logarithms of samples, s that is 0 by underflow is taken as the least float."""
    if not log_space:
        return dy * _sample_slope(a, out)
    tiny = jnp.finfo(out.dtype).tiny
    sample = lax.exp(out)
    sample = jnp.where(sample == 0, tiny, sample)
    return dy * (_sample_slope(a, sample) / sample)


def _sample_slope(a, sample):
    """JAX's ds/da; for samples that are none it holds nan as a constant, which is not one found."""
    with jax.debug_nans(False):
        return lax.random_gamma_grad(a, sample)


RULES = [
    elementwise(
        "erf", "y = erf x;  x̄ = ȳ 2/√π e^(−x²), 0 where that is 0.  Keeps x.  DLMF 7.9.",
        lambda dy, x: vanishing(dy, TWO_OVER_SQRT_PI * lax.exp(-x * x)),
    ),
    elementwise(
        "erfc", "y = 1 − erf x;  x̄ = −ȳ 2/√π e^(−x²), 0 where that is 0.  Keeps x.  DLMF 7.9.",
        lambda dy, x: vanishing(dy, -TWO_OVER_SQRT_PI * lax.exp(-x * x)),
    ),
    elementwise(
        "erf_inv", "y = erf⁻¹ x;  x̄ = ȳ √π/2 e^(y²).  Keeps y.  Infinite at x = ±1.",
        lambda dy, out: dy * (lax.exp(out * out) / TWO_OVER_SQRT_PI),
    ),
    elementwise(
        "lgamma", "y = ln|Γ(x)|;  x̄ = ȳ ψ(x).  Keeps x.  DLMF 5.2.2.",
        lambda dy, x: dy * lax.digamma(x),
    ),
    elementwise(
        "digamma", "y = ψ(x);  x̄ = ȳ ψ′(x).  Keeps x.  DLMF 5.15.",
        lambda dy, x: dy * lax.polygamma(jnp.ones_like(x), x),
    ),
    broadcasting(
        "polygamma", "y = ψ⁽ᵐ⁾(x);  x̄ = ȳ ψ⁽ᵐ⁺¹⁾(x).  Keeps m and x.  No derivative in m.",
        m=_no_derivative("polygamma", "m"),
        x=lambda dy, m, x: dy * lax.polygamma(m + 1, x),
    ),
    broadcasting(
        "igamma",
        "y = P(a, x);  x̄ = ȳ x^(a−1) e^(−x) / Γ(a), ā = ȳ ∂P/∂a by its own series (JAX's "
        "igamma_grad_a).  Both 0 at x = ∞; x̄ = ȳ at x = 0 for a = 1.  Keeps a and x.  DLMF 8.8.13.",
        a=_igamma_a, x=_igamma_x,
    ),
    broadcasting(
        "igammac",
        "y = 1 − P(a, x);  the cotangents of igamma with the other sign.  Keeps a and x.",
        a=lambda dy, a, x: _igamma_a(-dy, a, x), x=lambda dy, a, x: _igamma_x(-dy, a, x),
    ),
    broadcasting(
        "regularized_incomplete_beta",
        "y = Iₓ(a, b);  x̄ = ȳ x^(a−1) (1 − x)^(b−1) / B(a, b), where 0⁰ = 1.  Keeps a, b, x.  No "
        "derivative in a and b.  DLMF 8.17.",
        a=_no_derivative("regularized_incomplete_beta", "a"),
        b=_no_derivative("regularized_incomplete_beta", "b"),
        x=_betainc_x,
    ),
    elementwise(
        "bessel_i0e", "y = e^(−|x|) I₀(x);  x̄ = ȳ (e^(−|x|) I₁(x) − sign(x) y).  Keeps x and y.  "
        "Kink x = 0: slope 0.  DLMF 10.29.3.",
        lambda dy, x, out: dy * (lax.bessel_i1e(x) - lax.sign(x) * out),
    ),
    elementwise(
        "bessel_i1e",
        "y = e^(−|x|) I₁(x);  x̄ = ȳ (e^(−|x|) I₀(x) − y (sign(x) + 1/x)), 1/2 at x = 0.  "
        "Keeps x and y.  DLMF 10.29.2.",
        _i1e,
    ),
    rule(
        "random_gamma",
        "y ~ Γ(a, 1);  ā = ȳ ∂y/∂a along the quantile y = P⁻¹(a, u) at fixed u, −P_a / P_x "
        "(Figurnov, Mohamed & Mnih 2018).  Keeps a and y.",
        key=None, a=_random_gamma,
    ),
]
