"""Rules for arithmetic of two operands, comparisons, selection and integer operations.

Operands may be scalars or have size-1 dimensions; the boundary sums over what was broadcast.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from fbprop.core.rule import broadcasting, elementwise, linear, no_gradient, pair
from fbprop.rules.direction import over_squares


def _times(dy, other):
    """ȳ times the other operand, as what the forward multiplied (jax 0.12: ``out_dtype``)."""
    same = other.dtype == dy.dtype
    return dy * (other if same else lax.convert_element_type(other, dy.dtype))


def _share(dy, mine, other, out):
    """Cotangent of the operand that is the extremum; halves where the operands are equal."""
    half = jnp.asarray(0.5, dy.dtype)
    return dy * jnp.where(mine == out, jnp.where(mine == other, half, 1), 0).astype(dy.dtype)


def _extremum(name, formula):
    return broadcasting(
        name,
        f"{formula};  the cotangent goes to the operand that is y. Kink a = b: half to either, "
        "as JAX does. Keeps a, b, y.",
        a=lambda dy, a, b, out: _share(dy, a, b, out),
        b=lambda dy, a, b, out: _share(dy, b, a, out),
    )


def _pow_exponent(dy, x, out):
    """ȳ y log x, with 0 where x = 0 (y and its slope in n vanish there for n > 0)."""
    safe = jnp.where(x == 0, jnp.ones_like(x), x)
    return dy * jnp.where(x == 0, jnp.zeros_like(out), out * jnp.log(safe))


def _pow_base(dy, x, n):
    """ȳ n xⁿ⁻¹, with 0 for n = 0 so that x = 0 gives 0 and not 0·∞."""
    nothing = n == 0
    if jnp.issubdtype(n.dtype, jnp.inexact):  # what moves has a slope there, 1 / x
        nothing = nothing & ~jnp.isfinite(1 / x)
    n = lax.convert_element_type(n, x.dtype)
    return jnp.where(nothing, 0, dy * n * lax.pow(jnp.where(nothing, 1, x), n - 1))


def _integer_pow(dy, x, *, y):
    if y == 0:
        return None
    return dy * (y * lax.integer_pow(x, y - 1)) if y != 1 else dy


def _select_n(site, kept, dy):
    """Each case gets ȳ where it was chosen."""
    (which,), n = kept, len(site.in_avals) - 1
    zero = jnp.zeros_like(dy)
    cases = [[zero] * i + [dy] + [zero] * (n - i - 1) for i in range(n)]
    return [
        None, *(lax.select_n(which, *case) if a else None
                for case, a in zip(cases, site.active[1:])),
    ]


RULES = [
    broadcasting("add", "y = a + b;  ā = ȳ, b̄ = ȳ", a=lambda dy: dy, b=lambda dy: dy),
    broadcasting("add_any", "y = a + b;  ā = ȳ, b̄ = ȳ", a=lambda dy: dy, b=lambda dy: dy),
    broadcasting("sub", "y = a − b;  ā = ȳ, b̄ = −ȳ", a=lambda dy: dy, b=lambda dy: -dy),
    broadcasting(
        "mul", "y = a b;  ā = ȳ b, b̄ = ȳ a.  Keeps the other operand.",
        a=lambda dy, b: _times(dy, b), b=lambda dy, a: _times(dy, a),
    ),
    broadcasting(
        "div", "y = a / b;  ā = ȳ / b, b̄ = −ȳ y / b.  Keeps b and y.",
        a=lambda dy, b: dy / b, b=lambda dy, b, out: -dy * out / b,
    ),
    _extremum("max", "y = max(a, b)"),
    _extremum("min", "y = min(a, b)"),
    broadcasting(
        "pow", "y = xⁿ;  x̄ = ȳ n xⁿ⁻¹, n̄ = ȳ y log x.  Keeps x, n, y. At x = 0: n̄ = 0.",
        x=_pow_base, n=_pow_exponent,
    ),
    broadcasting(
        "rem", "y = a − b·trunc(a / b);  ā = ȳ, b̄ = −ȳ trunc(a / b).  Keeps a and b.",
        a=lambda dy: dy, b=lambda dy, a, b: -dy * lax.round(_trunc(a / b)),
    ),
    broadcasting(
        "atan2",
        "y = atan2(a, b);  ā = ȳ b / (a² + b²), b̄ = −ȳ a / (a² + b²), 0 where either is infinite, "
        "nan at (0, 0).  Keeps a and b.",
        a=lambda dy, a, b: dy * over_squares(b, a), b=lambda dy, a, b: -dy * over_squares(a, b),
    ),
    elementwise(
        "integer_pow", "y = xⁿ, n a static integer;  x̄ = ȳ n xⁿ⁻¹.  Keeps x.", _integer_pow
    ),
    linear("neg", "y = −x;  x̄ = −ȳ", lambda dy: -dy),
    pair(
        "select_n", "y = case[which];  each case gets ȳ where chosen, else 0.  Keeps which.",
        _select_n, keep=lambda site: (0,), keeps="which",
    ),
    *no_gradient(
        "A comparison: piecewise constant, no gradient.",
        "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "le_to", "lt_to", "is_finite",
    ),
    *no_gradient(
        "An operation on integers or bits: no gradient.",
        "and", "or", "xor", "not", "shift_left", "shift_right_arithmetic", "shift_right_logical",
        "population_count", "clz", "mulhi", "iota",
    ),
    *no_gradient(
        "Random bits and their keys: discrete, no gradient.",
        "random_bits", "random_fold_in", "random_seed", "random_split", "random_wrap",
        "random_unwrap", "random_clone", "threefry2x32", "rng_bit_generator", "rng_uniform",
    ),
]


def _trunc(x):
    return jnp.sign(x) * jnp.floor(jnp.abs(x))
