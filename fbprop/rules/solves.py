"""Rules for solving linear systems of special form, and the matrix notation of linalg.py.

Matrices are the last two dimensions; all others are batch. All products are in full precision, as
JAX's are: rounding to bfloat16 or TF32 is not what somebody who factors a matrix expects.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from fbprop.core.rule import pair


def mm(a, b):
    """a b."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def t(a):
    """aᵀ."""
    return jnp.swapaxes(a, -1, -2)


def h(a):
    """aᴴ."""
    return jnp.conj(t(a))


def diagonal(a):
    return jnp.diagonal(a, axis1=-2, axis2=-1)


def eye_like(a):
    """Identity matrices in the shape of the square matrices ``a``."""
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def diag(d):
    """The matrix with this diagonal."""
    n = d.shape[-1]
    return jnp.where(jnp.broadcast_to(jnp.eye(n, dtype=bool), (*d.shape, n)), d[..., None], 0)


def solve_triangular(a, b, **form):
    """op(a)⁻¹ b, or b op(a)⁻¹; reads one triangle of ``a``."""
    return lax.linalg.triangular_solve(a, b, **form)


def unpermute(a, permutation):
    """The rows of ``a`` that were taken as ``rows[permutation]``, back in their places."""
    return jnp.take_along_axis(a, jnp.argsort(permutation, -1)[..., None], -2)


def solve_adjoint(a, b):
    """a⁻ᴴ b, for any invertible ``a``."""
    lu, _, permutation = lax.linalg.lu(a)
    adjoint = {"left_side": True, "transpose_a": True, "conjugate_a": True}
    z = solve_triangular(lu, b, lower=False, **adjoint)
    z = solve_triangular(lu, z, lower=True, unit_diagonal=True, **adjoint)
    return unpermute(z, permutation)


def _triangular_solve(site, kept, dy):
    """b̄ is a solve with the transposed matrix; the matrix's cotangent an outer product of it."""
    a, *x = kept
    p = site.params
    db = solve_triangular(a, dy, **dict(p, transpose_a=not p["transpose_a"]))
    if not site.reached[0]:
        return [None, db]
    da = -mm(db, t(x[0])) if p["left_side"] else -mm(t(x[0]), db)
    da = t(da) if p["transpose_a"] else da
    da = jnp.conj(da) if p["conjugate_a"] else da
    offset = 1 if p["unit_diagonal"] else 0
    da = jnp.tril(da, -offset) if p["lower"] else jnp.triu(da, offset)
    return [da, db if site.reached[1] else None]


def _tridiagonal_solve(site, kept, dy):
    lower, main, upper, *x = kept
    below = jnp.roll(upper, 1, -1).at[..., 0].set(0)
    above = jnp.roll(lower, -1, -1).at[..., -1].set(0)
    db = lax.linalg.tridiagonal_solve(below, main, above, dy, **site.params)
    if not any(site.reached[:3]):
        return [None, None, None, db]
    x = x[0]
    before = jnp.roll(x, 1, -2).at[..., 0, :].set(0)
    after = jnp.roll(x, -1, -2).at[..., -1, :].set(0)
    return [*(-jnp.sum(db * shifted, -1) for shifted in (before, x, after)), db]


RULES = [
    pair(
        "triangular_solve",
        "Y = op(A)⁻¹ B or B op(A)⁻¹;  B̄ = op(A)⁻ᵀ Ȳ or Ȳ op(A)⁻ᵀ, the cotangent of op(A) is −B̄ Yᵀ "
        "or −Yᵀ B̄, within the triangle that is read.  Keeps A, and Y for Ā.  Giles 2008, 2.3.1.",
        _triangular_solve, keep=lambda site: (0, 2) if site.active[0] else (0,),
        keeps="A; for Ā the result",
    ),
    pair(
        "tridiagonal_solve",
        "Y = T⁻¹ B, T with diagonals l, d, u;  B̄ = T⁻ᵀ Ȳ, T̄ = −B̄ Yᵀ on the three diagonals (the "
        "first of l and the last of u are not read: 0).  Keeps l, d, u, and Y for T̄.",
        _tridiagonal_solve,
        keep=lambda site: (0, 1, 2, 4) if any(site.active[:3]) else (0, 1, 2),
        keeps="T; for T̄ the result",
    ),
]
