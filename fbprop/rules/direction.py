"""Directions in the plane, for sizes whose square over- or underflows."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def scaled(a, b):
    """a / m, b / m and m, the larger of |a| and |b|; of infinite ones only the sign counts.

    m takes no part in a derivative: what is made of the three does not depend on it. (0, 0) stays.
    """
    m = lax.stop_gradient(jnp.maximum(lax.abs(a), lax.abs(b)))
    far = m == jnp.inf
    a, b = (jnp.where(far, jnp.where(lax.abs(v) == m, lax.sign(v), 0), v) for v in (a, b))
    by = jnp.where(far | (m == 0), 1, m)
    return a / by, b / by, m


def direction(a, b):
    """(a, b) / √(a² + b²), 0 of (0, 0)."""
    a, b, _ = scaled(a, b)
    square = lax.square(a) + lax.square(b)
    inverse = lax.rsqrt(jnp.where(square == 0, 1, square))
    return a * inverse, b * inverse


def over_squares(a, b):
    """a / (a² + b²).

    Times 1 / ...: XLA makes one division of two that follow each other, and its divisor is as m².
    """
    a, b, m = scaled(a, b)
    return a * (1 / (m * (lax.square(a) + lax.square(b))))
