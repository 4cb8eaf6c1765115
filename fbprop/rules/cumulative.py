"""Rules for running sums, products and extrema along an axis.

JAX differentiates all but the sum as a tree: pairs are combined, the half as long result is scanned
the same way, and the elements between are combined with their left neighbour (Blelloch 1990,
"Prefix sums and their applications", the form of `jax.lax.associative_scan`). `_unscan` walks that
tree backward. Every intermediate result is either an element of y or a pair of x combined again,
so x and y are all that is kept, ties fall exactly as in JAX, and nothing is divided by.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core.rule import Pullbacks, linear


@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)  # one dispatch if run eagerly
def _unscan(dy, x, y, axis, combine, pull):
    """Cotangent of x for y₀ = x₀, yᵢ = combine(yᵢ₋₁, xᵢ) along the axis, in O(n) operations."""
    n = x.shape[axis]
    if n < 2:
        return dy
    every_other = lambda a, start, stop=None: lax.slice_in_dim(a, start, stop, 2, axis)
    left, right, odd = every_other(x, 0, n - n % 2), every_other(x, 1), every_other(y, 1)
    pairs = combine(left, right)
    # y₂ₖ = combine(y₂ₖ₋₁, x₂ₖ) for k > 0, and y₀ = x₀.
    earlier = lax.slice_in_dim(odd, 0, (n - 1) // 2, 1, axis)
    d_earlier, d_even = pull(every_other(dy, 2), earlier, every_other(x, 2), every_other(y, 2))
    d_odd = every_other(dy, 1) + _padded(d_earlier, axis, 0, 1 - n % 2)
    d_left, d_right = pull(_unscan(d_odd, pairs, odd, axis, combine, pull), left, right, pairs)
    first = lax.slice_in_dim(dy, 0, 1, 1, axis)
    d_even = lax.concatenate([first, d_even], axis) + _padded(d_left, axis, 0, n % 2)
    return _padded(d_even, axis, 0, 1 - n % 2, 1) + _padded(d_right, axis, 1, n % 2, 1)


def _padded(x, axis, before, after, between=0):
    config = [(0, 0, 0)] * x.ndim
    config[axis] = before, after, between
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _product_pull(d, a, b, out):
    return d * b, d * a


def _extremum_pull(d, a, b, out):
    half = jnp.asarray(0.5, d.dtype)
    share = lambda mine, other: jnp.where(mine == out, jnp.where(mine == other, half, 1), 0)
    return d * share(a, b).astype(d.dtype), d * share(b, a).astype(d.dtype)


def below(a, out):
    """a − y for a term of y = log(exp a + exp b + ...): −∞ if all are, 0 if a is +∞."""
    infinite = lax.abs(out) == jnp.inf
    return jnp.where(infinite, jnp.where(a == jnp.inf, 0, -jnp.inf), a - out)


def _logaddexp_pull(d, a, b, out):
    return d * jnp.exp(below(a, out)), d * jnp.exp(below(b, out))


class TreeScan(Pullbacks):
    """A running `combine`, forward by the same tree: the primitive takes up to 7 times as long."""

    def __init__(self, name, math, combine, pull, flat=None):
        def pullback(dy, x, out, *, axis, reverse):
            if flat is not None:
                dy = lax.select(out == flat, lax.full_like(dy, 0), dy)
            turn = lambda a: lax.rev(a, (axis,)) if reverse else a
            return turn(_unscan(turn(dy), turn(x), turn(out), axis, combine, pull))

        super().__init__(name, math, {"x": pullback})
        self.combine = combine

    def prepare(self, site):
        def forward(x):
            return [lax.associative_scan(self.combine, x, **site.params)], ()

        return super().prepare(site)._replace(forward=forward)


RULES = [
    linear(
        "cumsum", "yᵢ = Σ x over j ≤ i;  x̄ᵢ = Σ ȳ over j ≥ i: the sum from the other end.",
        lambda dy, *, axis, reverse: lax.cumsum(dy, axis, not reverse),
    ),
    TreeScan(
        "cumprod", "yᵢ = yᵢ₋₁ xᵢ;  x̄ by the tree, no division: exact where x = 0.  Keeps x and y.",
        lax.mul, _product_pull,
    ),
    TreeScan(
        "cummax",
        "yᵢ = max(yᵢ₋₁, xᵢ);  x̄ by the tree. Kink: halves at each tie in it, as JAX.  Keeps x, y.",
        lax.max, _extremum_pull,
    ),
    TreeScan(
        "cummin",
        "yᵢ = min(yᵢ₋₁, xᵢ);  x̄ by the tree. Kink: halves at each tie in it, as JAX.  Keeps x, y.",
        lax.min, _extremum_pull,
    ),
    TreeScan(
        "cumlogsumexp",
        "yᵢ = log(exp yᵢ₋₁ + exp xᵢ);  x̄ by the tree, weights exp(a − y) ≤ 1, 0 where y = −∞.  "
        "Keeps x and y.",
        jnp.logaddexp, _logaddexp_pull, flat=-jnp.inf,
    ),
]
