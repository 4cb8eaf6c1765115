"""Rules for matrix decompositions.

The derivations use the inner product Re tr(Gᴴ dA) under which G_A is the conjugate of JAX's
cotangent, so the rules that conjugate anything begin and end with `jnp.conj` (free for real
matrices). X ∘ Y is the elementwise product, tril and triu are triangles, Φ is the lower triangle
with half of the diagonal.

Sources: M. Giles, "An extended collection of matrix derivative results for forward and reverse
mode algorithmic differentiation", Oxford NA-08/01 (2008); I. Murray, "Differentiation of the
Cholesky decomposition", arXiv:1602.07527; M. Seeger et al., "Auto-differentiating linear algebra",
arXiv:1710.08717; S. Walter & L. Lehmann, "Algorithmic differentiation of linear algebra functions",
arXiv:1001.1654; F. de Hoog, R. Anderssen & M. Lukas, "Differentiation of matrix functionals using
triangular factorization", Math. Comp. 80 (2011).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from fbprop.core.rule import pair
from fbprop.rules import solves
from fbprop.rules.solves import (
    diag,
    diagonal,
    eye_like,
    h,
    mm,
    solve_adjoint,
    solve_triangular,
    t,
    unpermute,
)


def _phi(a):
    """Lower triangle with half of the real diagonal."""
    d = jnp.real(diagonal(a)).astype(a.dtype)
    return jnp.tril(a, -1) + diag(d / 2)


def _cholesky(site, kept, dy):
    """S = L⁻ᴴ Φ(Lᴴ G_L) L⁻¹ is G_A up to symmetry; only A's lower triangle is read."""
    (factor,) = kept
    s = _phi(mm(h(jnp.tril(factor)), jnp.tril(jnp.conj(dy))))
    adjoint = {"lower": True, "transpose_a": True, "conjugate_a": True}
    s = solve_triangular(factor, s, left_side=True, **adjoint)
    s = solve_triangular(factor, s, left_side=False, lower=True)
    return [jnp.conj(_phi(s + h(s)))]


def _lu(site, kept, dy, *_):
    """With k = min(m, n), L₁ and U₁ the square blocks, Y₂₁ and Y₁₂ what is below or beside them:

    K = tril(L₁ᵀ Ȳ₁₁ − Ȳ₁₂ U₂ᵀ, −1) + triu(Ȳ₁₁ U₁ᵀ − L₂ᵀ Ȳ₂₁), and Ā in the pivoted row order is
    [[L₁⁻ᵀ K U₁⁻ᵀ, L₁⁻ᵀ Ȳ₁₂], [Ȳ₂₁ U₁⁻ᵀ, ·]].
    """
    lu, permutation = kept
    k = min(lu.shape[-2:])
    square, below, beside = lu[..., :k, :k], lu[..., k:, :k], lu[..., :k, k:]
    dy_square, dy_below, dy_beside = dy[..., :k, :k], dy[..., k:, :k], dy[..., :k, k:]
    unit = jnp.tril(square, -1) + eye_like(square)
    strict = mm(t(unit), dy_square) - mm(dy_beside, t(beside))
    upper = mm(dy_square, t(jnp.triu(square))) - mm(t(below), dy_below)
    left = {"left_side": True, "lower": True, "transpose_a": True, "unit_diagonal": True}
    right = {"left_side": False, "lower": False, "transpose_a": True}
    columns = jnp.concatenate([jnp.tril(strict, -1) + jnp.triu(upper), dy_beside], -1)
    columns = solve_triangular(square, columns, **left)
    rows = jnp.concatenate([columns[..., :k], dy_below], -2)
    rows = solve_triangular(square, rows, **right)
    da = jnp.concatenate([rows, columns[..., k:]], -1) if beside.shape[-1] else rows
    return [unpermute(da, permutation)]


def _qr(site, kept, dq, dr, *_):
    """Wide A = [A₁ A₂] = Q [R₁ R₂] is the square A₁ = Q R₁ and R₂ = Qᴴ A₂: G_A₂ = Q G_R₂, and
    A₂ G_R₂ᴴ = Q R₂ G_R₂ᴴ is added to G_Q. Tall full A: `_complement`, then as thin."""
    q, r, *permutation = kept
    gq, gr = jnp.conj(dq), jnp.conj(dr)
    m, n = q.shape[-2], r.shape[-1]
    k = min(m, n)
    if q.shape[-1] > k:
        gq, q, r, gr = _complement(q, gq, n), q[..., :n], r[..., :n, :], gr[..., :n, :]
    beside = gr[..., :, k:]
    ga = _thin_qr(q, r[..., :k], gq, gr[..., :k], mm(r[..., k:], h(beside)))
    if n > k:
        ga = jnp.concatenate([ga, mm(q, beside)], -1)
    ga = t(unpermute(t(ga), *permutation)) if permutation else ga
    return [jnp.conj(ga)]


def _thin_qr(q, r, gq, gr, extra):
    """G_A = (G_Q + Q (E + H)) R⁻ᴴ for A = Q R with square R.

    H is the Hermitian matrix with the upper triangle of W = G_R Rᴴ − Qᴴ G_Q − E and its diagonal's
    real part; E (zero unless A is wide) is what reaches Q as Q E.
    """
    w = mm(gr, h(r)) - mm(h(q), gq) - extra
    upper = h(_phi(h(w)))
    return solve_triangular(
        r, gq + mm(q, extra + upper + h(upper)),
        left_side=False, lower=False, transpose_a=True, conjugate_a=True,
    )


def _complement(q, gq, n):
    """G of Q's first n columns from that of all m: Householder's choice of the others.

    Z = Q_pn (Q_nn − I)⁻¹ with p = m − n, K = Q_mn + Q_mp Z: the others move by
    dQ_mp = dQ_mn Zᴴ − K ([−Z I] dQ_mn)ᴴ (arXiv:2409.13374, equation 32), here transposed.
    """
    top = q[..., :n, :n]
    z = h(solve_adjoint(top - eye_like(top), h(q[..., n:, :n])))
    k = q[..., :n] + mm(q[..., n:], z)
    others = gq[..., n:]
    folded = mm(h(others), k)
    return gq[..., :n] + mm(others, z) - jnp.concatenate([-mm(h(z), folded), folded], -2)


def _between(values, turned, k, dvalues):
    """``turned`` / (w_j − w_i) off the diagonal; of equal values a quotient that says nothing.

    Of φ(V h(W) Vᴴ), for one h, the derivative is there, while V has none. With Γ the gradient of φ
    in the basis V, the factors give k = Γ h(λ) and a Hermitian ``turned`` between equal values, the
    values the diagonal of Γ h'(λ), and Ā needs all of Γ h'(λ): k times the ratio of the diagonals.
    Where these are not proportional, or ``turned`` not Hermitian, φ is something else.

    Args:
      values: w; turned, k: what reaches V, in the basis V; dvalues: what reaches w, or None.
    """
    eps, off = jnp.finfo(values.dtype).eps, eye_like(k) == 0
    gaps, k_h = _gaps(values), (k + h(k)) / 2
    largest = lambda x, axes: jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    equal = jnp.abs(gaps) <= 16 * eps * largest(values, -1)[..., None]  # up to rounding
    turning = jnp.abs(turned - h(turned))
    found = equal & off & (turning <= 64 * eps * largest(k, (-2, -1)))
    ratio = jnp.zeros_like(values)
    if dvalues is not None:
        total = lambda x: jnp.sum(jnp.where(equal, x[..., None, :], 0), -1)
        d = jnp.real(diagonal(k))
        square, both, other = total(d * d), total(d * dvalues), total(dvalues * dvalues)
        fits = (square > 0) & (both * both >= (1 - 64 * eps) * square * other)
        found = found & fits[..., None]
        ratio = both / jnp.where(fits, square, 1)
    quotient = turned / jnp.where(found | ~off, 1, gaps).astype(k.dtype)
    return jnp.where(off, jnp.where(found, k_h * ratio[..., None].astype(k.dtype), quotient), 0)


def _gaps(w):
    """w_j − w_i."""
    return w[..., None, :] - w[..., None]


def _eigh(site, kept, dv, dw):
    """G_A = V (diag(w̄) + F ∘ Vᴴ G_V) Vᴴ, F_ij = 1 / (w_j − w_i) off the diagonal."""
    v, w = kept
    wanted_v, wanted_w = site.wanted
    if site.params["subset_by_index"] not in (None, (0, v.shape[-2])):
        raise NotImplementedError(
            "The derivative of eigh needs all eigenvectors, got subset_by_index="
            f"{site.params['subset_by_index']} expected None: take the subset of the full result."
        )
    g = diag(dw).astype(v.dtype)
    if wanted_v:
        k = mm(h(v), jnp.conj(dv))
        g = g + _between(w, k, k, dw if wanted_w else None)
    return [jnp.conj(mm(mm(v, g), h(v)))]


def _svd_forward(site, a):
    """Also without vectors asked for, thin ones are computed: the derivative is made of them."""
    if site.params["compute_uv"]:
        out = site.eqn.primitive.bind(a, **site.params)
        k = out[0].shape[-1]
        return out, (out[0], out[1][..., :k], out[2][..., :k, :])
    params = dict(site.params, compute_uv=True, full_matrices=False)
    s, u, vt = site.eqn.primitive.bind(a, **params)
    return [s], (s, u, vt)


def _svd(site, kept, ds, *dvectors):
    """G_A = U (diag(s̄) + F∘(P + Q) + E∘(P − Q)) Vᴴ + the parts of G_U, G_V outside U, V.

    P = X − Xᴴ, X = Uᴴ G_U, Q = Y − Yᴴ, Y = Vᴴ G_V, F_ij = 1 / 2(s_j − s_i), E_ij = 1 / 2(s_j + s_i)
    off the diagonal; for complex A the phases, which U and V share, are moved by U alone: + i
    Im(X_ii) / s_i.
    """
    s, u, vt = kept
    g = diag(ds).astype(u.dtype)
    if not any(site.wanted[1:]):
        return [jnp.conj(mm(mm(u, g), vt))]
    _check_svd(site)
    gu, gv = jnp.conj(dvectors[0]), t(dvectors[1])
    x, y = mm(h(u), gu), mm(vt, gv)
    p, q, row = x - h(x), y - h(y), s[..., None, :].astype(u.dtype)
    off = 1 - eye_like(x)
    sums = jnp.where(off == 0, 1, s[..., None, :] + s[..., None]).astype(u.dtype)
    g = g + _between(s, (p + q) / 2, x, ds if site.wanted[0] else None) + off * (p - q) / (2 * sums)
    if jnp.issubdtype(u.dtype, jnp.complexfloating):
        phases = jnp.imag(diagonal(x)) / jnp.where(s == 0, jnp.inf, s)
        g = g + diag(lax.complex(jnp.zeros_like(phases), phases))
    ga = mm(mm(u, g), vt)
    if u.shape[-2] > u.shape[-1]:
        ga = ga + mm((gu - mm(u, x)) / row, vt)
    if vt.shape[-1] > vt.shape[-2]:
        ga = ga + mm(u / row, h(gv - mm(h(vt), y)))
    return [jnp.conj(ga)]


def _check_svd(site):
    m, n = site.in_avals[0].shape[-2:]
    subset = site.params["subset_by_index"]
    if (site.params["full_matrices"] and m != n) or subset not in (None, (0, min(m, n))):
        raise NotImplementedError(
            "Singular vectors have a derivative if they are those of the nonzero singular values, "
            f"got full_matrices={site.params['full_matrices']}, subset_by_index={subset} for shape "
            f"({m}, {n}) expected full_matrices=False and no subset: take the thin decomposition."
        )


def _eig_forward(site, a):
    """Also without right vectors asked for, they are computed: the derivative is made of them."""
    left, right = (site.params[f"compute_{side}_eigenvectors"] for side in ("left", "right"))
    if any(site.wanted[1:]) and not site.params["enable_eigvec_derivs"]:
        raise NotImplementedError(
            "Eigenvectors of a general matrix have a derivative only if eigenvalues are distinct "
            "and with the normalisation of LAPACK's geev, got enable_eigvec_derivs=False expected "
            "True: pass it to jax.lax.linalg.eig, or use eigh for a Hermitian matrix."
        )
    params = dict(site.params, compute_right_eigenvectors=True)
    out = site.eqn.primitive.bind(a, **params)
    results = out if right else out[:-1]
    return results, (out[0], out[-1], *(out[1:2] if left and site.wanted[1] else ()))


def _eig(site, kept, dw, *dvectors):
    """G_A = V⁻ᴴ (diag(G_w) + F ∘ Vᴴ G_V') Vᴴ; left vectors are right ones of Aᴴ."""
    w, v, *left = kept
    dvectors = [jnp.conj(d) for d in dvectors]
    right = dvectors[-1] if site.params["compute_right_eigenvectors"] and site.wanted[-1] else None
    ga = _eigenvectors(w, v, jnp.conj(dw), right)
    if left:
        ga = ga + h(_eigenvectors(jnp.conj(w), left[0], jnp.zeros_like(dw), dvectors[0]))
    ga = jnp.conj(ga)
    is_real = jnp.issubdtype(site.in_avals[0].dtype, jnp.floating)
    return [jnp.real(ga) if is_real else ga]


def _eigenvectors(w, v, gw, gv):
    """G_A from those of eigenvalues and right eigenvectors (None: only eigenvalues).

    dv_j = u_j + c_j v_j with U = V (F ∘ V⁻¹ dA V), F_ij = 1 / (w_j − w_i): unit length and a real
    largest element v_kj fix c_j = −Re(v_jᴴ u_j) − i Im(u_kj) / v_kj.
    """
    g = diag(gw)
    if gv is not None:
        gamma = jnp.sum(jnp.conj(v) * gv, -2, keepdims=True)
        largest = jnp.argmax(jnp.abs(v), -2, keepdims=True)
        at_largest = lax.broadcasted_iota(largest.dtype, v.shape, v.ndim - 2) == largest
        turn = jnp.where(at_largest, jnp.imag(gamma) / jnp.where(at_largest, jnp.real(v), 1), 0)
        length = jnp.real(gamma).astype(v.dtype)
        gu = gv - v * length - lax.complex(jnp.zeros_like(turn), turn)
        inverse_gaps = 1 / (_gaps(w) + eye_like(v)) - eye_like(v)
        g = g + jnp.conj(inverse_gaps) * mm(h(v), gu)
    return mm(solve_adjoint(v, g), h(v))


RULES = [
    *solves.RULES,
    pair(
        "cholesky",
        "A = L Lᴴ;  Ā = Φ(S + Sᴴ), S = L⁻ᴴ Φ(Lᴴ L̄) L⁻¹, in the lower triangle, the one that is "
        "read.  Keeps L.  Murray 2016.",
        _cholesky, keep=lambda site: (1,), keeps="out",
    ),
    pair(
        "lu",
        "A[p] = L U;  Ā[p] = L⁻ᵀ (tril(Lᵀ Ȳ, −1) + triu(Ȳ Uᵀ)) U⁻ᵀ for square A, Y = L − I + U.  "
        "Keeps Y and p.  De Hoog et al. 2011.",
        _lu, keep=lambda site: (1, 3), keeps="the factors, the permutation",
    ),
    pair(
        "qr",
        "A = Q R;  Ā = (Q̄ + Q H) R⁻ᴴ, H Hermitian with the upper triangle of R̄ Rᴴ − Qᴴ Q̄.  Keeps "
        "Q, R (and the permutation).  Walter & Lehmann 2010.",
        _qr, keep=lambda site: tuple(range(1, 1 + len(site.out_avals))), keeps="the results",
    ),
    pair(
        "svd",
        "A = U S Vᴴ;  Ā = U (S̄ + F∘(X − Xᴴ) S + S F∘(Y − Yᴴ)) Vᴴ + ..., X = Uᴴ Ū, Y = Vᴴ V̄, "
        "F_ij = 1 / (s_j² − s_i²).  Keeps U, S, V.  Equal singular values: right for functions of "
        "U f(S) Vᴴ, for one f; infinite or nan otherwise.  Giles 2008, Seeger et al. 2017.",
        _svd, _svd_forward, keeps="U, S, V",
    ),
    pair(
        "eigh",
        "A = V W Vᴴ;  Ā = V (W̄ + F ∘ Vᴴ V̄) Vᴴ, F_ij = 1 / (w_j − w_i), for A as a Hermitian "
        "whole.  Keeps V and W.  Equal eigenvalues: right for functions of V f(W) Vᴴ, for one f; "
        "infinite or nan otherwise.  Giles 2008.",
        _eigh, keep=lambda site: (1, 2), keeps="the results",
    ),
    pair(
        "eig",
        "A V = V W;  Ā = V⁻ᴴ (W̄ + F ∘ Vᴴ V̄) Vᴴ with V̄ less what the normalisation takes, F_ij = "
        "1 / (w_j − w_i)*.  Keeps W, V, and the left vectors if used.  Giles 2008.",
        _eig, _eig_forward, keeps="eigenvalues, right eigenvectors",
    ),
]
