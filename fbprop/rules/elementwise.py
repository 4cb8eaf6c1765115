"""Rules for functions of one operand, element by element.

Each keeps whichever of operand and result gives the derivative at the least cost: the result, where
it will do, is usually kept by the next equation anyway. On complex operands x̄ = ȳ f'(z) without
conjugates, JAX's convention; `abs` and `sign`, which are not holomorphic, say what they do.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from fbprop.core import cotangent as ct
from fbprop.core.rule import Pullbacks, broadcasting, elementwise, linear, no_gradient, pair
from fbprop.rules.direction import direction

LN2 = math.log(2)


def _is_complex(x):
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def _one_minus_square(x):
    """1 − x² as a product: near |x| = 1 the square would have lost half of the digits."""
    return (1 - x) * (1 + x)


def vanishing(dy, slope):
    """ȳ times a slope; 0 where that is 0, even of an infinite ȳ or nan.

    What has underflowed passes nothing on: the entropy of a probability that is 0 has an infinite
    slope in it, and none in what the probability is made of.
    """
    return lax.select(slope == 0, lax.full_like(dy, 0), dy) * slope


def _from_result(name, math, by_result, by_operand):
    """A function whose slope is lost from y where y saturates; accuracy=HIGHEST has it from x."""

    def highest(site):
        return site.params.get("accuracy") is lax.AccuracyMode.HIGHEST

    def backward(site, kept, dy):
        return [(by_operand if highest(site) else by_result)(dy, *kept)]

    return pair(
        name, math, backward, keep=lambda site: (0,) if highest(site) else (1,),
        keeps="out (x at accuracy=HIGHEST)",
    )


def _abs(dy, x):
    if not _is_complex(x):
        return lax.select(x >= 0, dy, -dy)
    cosine, sine = direction(lax.real(x), lax.imag(x))
    return lax.complex(dy * cosine, -dy * sine)


def _asinh(dy, x):
    """ȳ / √(1 + x²), with x and 1 divided by m = max(1, |x|) so that the square cannot overflow."""
    if _is_complex(x):
        return dy * lax.rsqrt(1 + x * x)
    m = lax.stop_gradient(jnp.clip(lax.abs(x), 1, jnp.finfo(x.dtype).max))
    return dy * (lax.rsqrt(lax.square(x / m) + lax.square(1 / m)) / m)


def _convert(dy, *, x_aval):
    return ct.converted(dy, x_aval.dtype)


class _Sign(Pullbacks):
    """Piecewise constant on the real line, where nothing flows; on the complex plane it turns."""

    def active_out(self, site):
        return (_is_complex(site.out_avals[0]),)


def _sign(dy, x, out):
    """y turns with the angle of x, whose slope is Im(ẋ conj y) / |x|; 0 at x = 0."""
    size = lax.abs(x)
    turn = lax.imag(dy * out) / jnp.where(size == 0, 1, size)
    return lax.complex(turn * lax.imag(out), turn * lax.real(out))


def _polynomial(site, kept, dy):
    """x̄ = ȳ Σ k cₖ xᵏ⁻¹ by Horner's scheme, c̄ₖ = ȳ xᵏ."""
    x, *coefficients = kept
    dx, power, dcs = None, dy, []
    if site.reached[0]:
        slopes = [k * c for k, c in enumerate(coefficients, 1)]
        dx = jnp.zeros_like(dy)
        for slope in reversed(slopes):
            dx = dx * x + slope
        dx = dy * dx
    for wanted in site.reached[1:]:
        dcs.append(power if wanted else None)
        power = power * x
    return [dx, *dcs]


def _polynomial_keeps(site):
    return (0, *range(2, len(site.in_avals))) if site.active[0] else (0,)


def _broadcast(rule):
    rule.broadcasts = True
    return rule


EXPONENTIALS = [
    elementwise(
        "exp", "y = eˣ;  x̄ = ȳ y, 0 where y = 0, even of an infinite ȳ.  Keeps y.",
        lambda dy, out: vanishing(dy, out),
    ),
    elementwise(
        "exp2", "y = 2ˣ;  x̄ = ȳ y ln 2, 0 where y = 0, even of an infinite ȳ.  Keeps y.",
        lambda dy, out: vanishing(dy, out * LN2),
    ),
    _from_result(
        "expm1", "y = eˣ − 1;  x̄ = ȳ (y + 1).  Keeps y.",
        lambda dy, y: dy * (y + 1), lambda dy, x: dy * lax.exp(x),
    ),
    elementwise("log", "y = ln x;  x̄ = ȳ / x.  Keeps x.", lambda dy, x: dy / x),
    elementwise("log2", "y = log₂ x;  x̄ = ȳ / (x ln 2).  Keeps x.", lambda dy, x: dy / (x * LN2)),
    elementwise("log1p", "y = ln(1 + x);  x̄ = ȳ / (1 + x).  Keeps x.", lambda dy, x: dy / (1 + x)),
    _from_result(
        "tanh", "y = tanh x;  x̄ = ȳ(1 − y²)",
        lambda dy, y: dy * _one_minus_square(y),
        lambda dy, x: dy * (4 * lax.logistic(2 * x) * lax.logistic(-2 * x)),
    ),
    _from_result(
        "logistic",
        "y = 1 / (1 + e⁻ˣ);  x̄ = ȳ y (1 − y), where y is 0 or 1 even 0 of an infinite ȳ.  Keeps y.",
        lambda dy, y: vanishing(dy, y * (1 - y)),
        lambda dy, x: vanishing(dy, lax.logistic(x) * lax.logistic(-x)),
    ),
]

TRIGONOMETRY = [
    elementwise(
        "sin", "y = sin x;  x̄ = ȳ cos x.  Keeps x.",
        lambda dy, x, *, accuracy=None: dy * lax.cos(x, accuracy=accuracy),
    ),
    elementwise(
        "cos", "y = cos x;  x̄ = −ȳ sin x.  Keeps x.",
        lambda dy, x, *, accuracy=None: -dy * lax.sin(x, accuracy=accuracy),
    ),
    elementwise(
        "tan", "y = tan x;  x̄ = ȳ (1 + y²).  Keeps y.", lambda dy, out: dy * (1 + out * out)
    ),
    elementwise(
        "asin", "y = arcsin x;  x̄ = ȳ / √(1 − x²).  Keeps x.  Infinite at x = ±1.",
        lambda dy, x: dy * lax.rsqrt(_one_minus_square(x)),
    ),
    elementwise(
        "acos", "y = arccos x;  x̄ = −ȳ / √(1 − x²).  Keeps x.  Infinite at x = ±1.",
        lambda dy, x: -dy * lax.rsqrt(_one_minus_square(x)),
    ),
    elementwise(
        "atan", "y = arctan x;  x̄ = ȳ / (1 + x²).  Keeps x.", lambda dy, x: dy / (1 + x * x)
    ),
    elementwise(
        "sinh", "y = sinh x;  x̄ = ȳ cosh x.  Keeps x.", lambda dy, x: dy * lax.cosh(x)
    ),
    elementwise(
        "cosh", "y = cosh x;  x̄ = ȳ sinh x.  Keeps x.", lambda dy, x: dy * lax.sinh(x)
    ),
    elementwise("asinh", "y = arsinh x;  x̄ = ȳ / √(1 + x²).  Keeps x.", _asinh),
    elementwise(
        "acosh",
        "y = arcosh x;  x̄ = ȳ / (√(x − 1) √(x + 1)), two roots because √(x² − 1) has the wrong "
        "sign where Re x < 0.  Keeps x.  Infinite at x = 1.",
        lambda dy, x: dy * (lax.rsqrt(x - 1) * lax.rsqrt(x + 1)),
    ),
    elementwise(
        "atanh", "y = artanh x;  x̄ = ȳ / (1 − x²).  Keeps x.  Infinite at x = ±1.",
        lambda dy, x: dy / _one_minus_square(x),
    ),
]

POWERS = [
    elementwise(
        "sqrt", "y = √x;  x̄ = ȳ / 2y.  Keeps y.  Infinite at x = 0.",
        lambda dy, out: dy / (2 * out),
    ),
    elementwise(
        "rsqrt", "y = 1/√x;  x̄ = −ȳ y³ / 2.  Keeps y.",
        lambda dy, out: dy * (-0.5 * out * out * out),
    ),
    elementwise(
        "cbrt", "y = ∛x;  x̄ = ȳ / 3y².  Keeps y.  Infinite at x = 0.",
        lambda dy, out: dy / (3 * out * out),
    ),
    elementwise("square", "y = x²;  x̄ = 2 ȳ x.  Keeps x.", lambda dy, x: dy * (2 * x)),
    elementwise(
        "one_minus_square", "y = 1 − x²;  x̄ = −2 ȳ x.  Keeps x.", lambda dy, x: dy * (-2 * x)
    ),
    _broadcast(pair(
        "polynomial",
        "y = Σ cₖ xᵏ;  x̄ = ȳ Σ k cₖ xᵏ⁻¹, c̄ₖ = ȳ xᵏ.  Keeps x, and c₁, c₂, ... for x̄.",
        _polynomial, keep=_polynomial_keeps, keeps="x; for x̄ the coefficients",
    )),
]

STEPS = [
    elementwise(
        "abs",
        "y = |x|;  x̄ = ȳ where x ≥ 0, −ȳ elsewhere; complex: x̄ = ȳ conj(x) / |x|, 0 at x = 0, its "
        "limit where a part of x is infinite.  Keeps x.  Kink x = 0: slope 1.",
        _abs,
    ),
    _Sign(
        "sign",
        "y = x / |x|;  real: gradient 0; complex: x̄ = i Im(ȳ y) conj(y) / |x|, 0 at x = 0.  "
        "Keeps x and y.",
        {"x": _sign},
    ),
    broadcasting(
        "nextafter", "y = the float next to x on the way to t;  x̄ = ȳ, t gets nothing",
        x=lambda dy: dy, t=None,
    ),
    *no_gradient("Piecewise constant: gradient 0 where defined.", "floor", "ceil", "round"),
    *no_gradient("Blocks the gradient by definition.", "stop_gradient"),
]

TYPES = [
    linear(
        "convert_element_type", "y = x as another dtype;  x̄ = ȳ as x's, Re ȳ if only y is complex.",
        _convert,
    ),
    linear("copy", "y = x;  x̄ = ȳ", lambda dy: dy),
]

RULES = [*EXPONENTIALS, *TRIGONOMETRY, *POWERS, *STEPS, *TYPES]
