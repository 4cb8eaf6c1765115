"""Rules for running sums, products and extrema along an axis.

JAX differentiates all but the sum as a tree: pairs are combined, the half as long result is scanned
the same way, and the elements between are combined with their left neighbour (Blelloch 1990,
"Prefix sums and their applications", the form of `jax.lax.associative_scan`). `_unscan` walks that
tree backward. Every intermediate result is either an element of y or a pair of x combined again,
so x and y are all that is kept, ties fall exactly as in JAX, and nothing is divided by.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from fbprop.rule import elementwise, linear


def _unscan(dy, x, y, combine, pull):
    """Cotangent of x for y₀ = x₀, yᵢ = combine(yᵢ₋₁, xᵢ), along axis 0, in O(n) operations."""
    n = x.shape[0]
    if n < 2:
        return dy
    left, right, odd = x[: n - n % 2 : 2], x[1::2], y[1::2]
    pairs = combine(left, right)
    # y₂ₖ = combine(y₂ₖ₋₁, x₂ₖ) for k > 0, and y₀ = x₀.
    earlier = odd[: (n - 1) // 2]
    d_earlier, d_even = pull(dy[2::2], earlier, x[2::2], y[2::2])
    d_odd = dy[1::2] + _pad_end(d_earlier, odd.shape[0] - earlier.shape[0])
    d_pairs = _unscan(d_odd, pairs, odd, combine, pull)
    d_left, d_right = pull(d_pairs, left, right, pairs)
    d_even = jnp.concatenate([dy[:1], d_even]) + _pad_end(d_left, n % 2)
    return _interleave(d_even, d_right)


def _pad_end(x, count):
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, count, 0)] + [(0, 0, 0)] * (x.ndim - 1))


def _interleave(even, odd):
    n, zero = even.shape[0] + odd.shape[0], jnp.zeros((), even.dtype)
    rest = [(0, 0, 0)] * (even.ndim - 1)
    even = lax.pad(even, zero, [(0, 1 - n % 2, 1), *rest])
    return even + lax.pad(odd, zero, [(1, n % 2, 1), *rest])


def _product_pull(d, a, b, out):
    return d * b, d * a


def _extremum_pull(d, a, b, out):
    half = jnp.asarray(0.5, d.dtype)
    share = lambda mine, other: jnp.where(mine == out, jnp.where(mine == other, half, 1), 0)
    return d * share(a, b).astype(d.dtype), d * share(b, a).astype(d.dtype)


def _logaddexp_pull(d, a, b, out):
    a, b, out = (jnp.where(v == jnp.inf, jnp.zeros_like(v), v) for v in (a, b, out))
    return d * jnp.exp(a - out), d * jnp.exp(b - out)


def _along(combine: Callable, pull: Callable):
    def pullback(dy, x, out, *, axis, reverse):
        move = lambda v: jnp.moveaxis(lax.rev(v, (axis,)) if reverse else v, axis, 0)
        dx = jnp.moveaxis(_unscan(move(dy), move(x), move(out), combine, pull), 0, axis)
        return lax.rev(dx, (axis,)) if reverse else dx

    return pullback


RULES = [
    linear(
        "cumsum", "yᵢ = Σ x over j ≤ i;  x̄ᵢ = Σ ȳ over j ≥ i: the sum from the other end.",
        lambda dy, *, axis, reverse: lax.cumsum(dy, axis, not reverse),
    ),
    elementwise(
        "cumprod",
        "yᵢ = yᵢ₋₁ xᵢ;  x̄ by the tree, no division: exact where x = 0.  Keeps x and y.",
        _along(lax.mul, _product_pull),
    ),
    elementwise(
        "cummax",
        "yᵢ = max(yᵢ₋₁, xᵢ);  x̄ by the tree. Kink: halves at each tie in the tree, as JAX. Keeps x "
        "and y.",
        _along(lax.max, _extremum_pull),
    ),
    elementwise(
        "cummin",
        "yᵢ = min(yᵢ₋₁, xᵢ);  x̄ by the tree. Kink: halves at each tie in the tree, as JAX. Keeps x "
        "and y.",
        _along(lax.min, _extremum_pull),
    ),
    elementwise(
        "cumlogsumexp",
        "yᵢ = log(exp yᵢ₋₁ + exp xᵢ);  x̄ by the tree, weights exp(a − y) ≤ 1.  Keeps x and y.",
        _along(jnp.logaddexp, _logaddexp_pull),
    ),
]
