"""Rotary position embedding: pairs of features turned by an angle that grows with the position."""

from __future__ import annotations

import jax.numpy as jnp

from fbprop.core.operation import Operation
from fbprop.core.precision import wide_dtype
from fbprop.ops.arguments import floating
from fbprop.rules import register


def rotary(x, positions=None, *, base: float = 10000.0, interleaved: bool = False):
    """Features (a, b) of pair i of D / 2 turned by θ = position · base^(−2 i / D) (Su et al. 2021).

    ya = a cos θ − b sin θ, yb = b cos θ + a sin θ; so the product of a query and a key depends on
    the distance of their positions. The way back turns by −θ, and needs no x.

    | kept | shape | instead of |
    |---|---|---|
    | positions | [..., T] integers | cosines and sines, [..., T, 1, D / 2] each |

    Angles are computed in float32 at least, from positions: they are made again in the way back.

    Args:
      x: [..., T, H, D], floating, D even: queries or keys by heads.
      positions: [T], or [..., T] as x has; integers or floating, constants. None: 0 .. T − 1.
      base: above 0; the slowest pair turns once in 2π · base positions.
      interleaved: pairs are neighbours (0, 1), (2, 3), ... as in GPT-J; otherwise (i, i + D / 2) as
        in GPT-NeoX and LLaMA.

    Returns:
      As x.

    Raises:
      ValueError: x has fewer than 3 dimensions, or an odd D; positions that do not fit; base not
        above 0.   TypeError: x is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> y = ops.rotary(jnp.ones((2, 1, 2)))  # by 0 and 1 radian
      >>> bool(jnp.allclose(y[1, 0], jnp.array([jnp.cos(1) - jnp.sin(1), jnp.cos(1) + jnp.sin(1)])))
      True
    """
    x = floating("rotary", x)
    if x.ndim < 3 or x.shape[-1] % 2:
        raise ValueError(f"rotary turns pairs of x [..., T, H, D], got shape {x.shape} expected at "
                         "least three dimensions and an even D.")
    if not base > 0:
        raise ValueError(f"rotary's angles are powers of its base, got base={base} expected one "
                         "above 0.")
    steps = x.shape[:-2]
    positions = jnp.arange(steps[-1]) if positions is None else jnp.asarray(positions)
    if positions.ndim == 0 or positions.shape != steps[len(steps) - positions.ndim:]:
        raise ValueError(f"rotary's positions are those of x's steps, got shape {positions.shape} "
                         f"expected {steps[-1:]} or {steps}.")
    return _rotary(x, positions, base=float(base), interleaved=bool(interleaved))


def turned(x, positions, sign, base, interleaved):
    """Pairs of x turned by sign · θ."""
    half, wide = x.shape[-1] // 2, wide_dtype(x.dtype)
    speeds = base ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions.astype(wide)[..., None, None] * speeds
    cos, sin = jnp.cos(angles), sign * jnp.sin(angles)
    pairs = x.astype(wide).reshape(*x.shape[:-1], *((half, 2) if interleaved else (2, half)))
    axis = -1 if interleaved else -2
    a, b = (jnp.take(pairs, i, axis) for i in (0, 1))
    both = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis)
    return both.reshape(x.shape).astype(x.dtype)


_rotary = Operation(
    "rotary", "y = x turned by θ(position), pair by pair;  x̄ = ȳ turned by −θ.  Keeps positions.",
    lambda x, positions, *, base, interleaved: turned(x, positions, 1, base, interleaved),
    lambda x, positions, *, base, interleaved: turned(x, positions, 1, base, interleaved),
    lambda dy, positions, *, base, interleaved: (
        turned(dy, positions, -1, base, interleaved), None),
)
register(*_rotary.rules)
