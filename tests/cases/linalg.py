"""Rows of rules/linalg.py and rules/solves.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cases.case import Case, complex_, definite, real

NEWER = jax.__version_info__ >= (0, 12)
SINGLE = ("float32",)  # LAPACK's only lower precision
linalg = lax.linalg


def hermitian(n, *batch):
    """Positive definite, well conditioned."""

    def spec(rng):
        a = rng.standard_normal((*batch, n, n)) + 1j * rng.standard_normal((*batch, n, n))
        return a @ np.conj(np.swapaxes(a, -1, -2)) + n * np.eye(n)

    return spec


def dominant(operand):
    """With a heavy diagonal, so that no small change of an element changes a pivot."""

    def spec(rng):
        a = operand(rng)
        return a + 5 * np.eye(*a.shape[-2:])

    return spec


def spread(operand):
    """With diagonal 3, 6, 9, ..., so that eigenvalues and singular values are well apart."""

    def spec(rng):
        a = operand(rng)
        m, n = a.shape[-2:]
        return a + 3 * np.arange(1, m + 1)[:, None] * np.eye(m, n)

    return spec


def uneven(operand):
    """With columns of lengths well apart, so that the order of pivoting is certain."""
    return lambda rng: operand(rng) * 4.0 ** np.arange(operand(rng).shape[-1])


def row(name, fun, operand, label="", dtypes=SINGLE, **more):
    operands = operand if isinstance(operand, tuple) else (operand,)
    return Case(name, fun, operands, label, dtypes=dtypes, **more)


def vectors(name, fun, operand, label="", **more):
    """A row of vectors with the sign that LAPACK gave them, which may be another in float32."""
    return row(name, fun, operand, label, dtypes=(), **more)


def with_form(solve, **form):
    return functools.partial(solve, **form)


def triangular(label, a, b, **form):
    fun = with_form(linalg.triangular_solve, **form)
    return row("triangular_solve", fun, (dominant(a), b), label)


def only_factors(a):
    return linalg.lu(a)[0]


def pivoted(a):
    return linalg.qr(a, pivoting=True, full_matrices=False)[:2]


def sizes(a):
    """Eigenvectors without their phases, which LAPACK chooses."""
    v, w = linalg.eigh(a)
    return jnp.abs(v), w


def of_sum(decompose):
    """Applied to A + Aᴴ as it is: a derivative for one triangle and one for the whole agree."""
    return lambda a: decompose(a + jnp.conj(jnp.swapaxes(a, -1, -2)), symmetrize_input=False)


def projections(a):
    """Outer products of the singular vectors, without the phases that they share."""
    u, s, vt = linalg.svd(a, full_matrices=False)
    return lax.batch_matmul(jnp.expand_dims(u.T, 2), jnp.expand_dims(vt, 1)), s


def eigenvalues(a):
    return linalg.eig(a, compute_left_eigenvectors=False, compute_right_eigenvectors=False)[0]


def eigenvalues_twice(a):
    return linalg.eig(a, compute_left_eigenvectors=False, compute_right_eigenvectors=False,
                      enable_eigvec_derivs=True)[0]


eig = with_form(linalg.eig, enable_eigvec_derivs=True)
thin = with_form(linalg.svd, full_matrices=False)
values = with_form(linalg.svd, compute_uv=False)
qr = with_form(linalg.qr, full_matrices=False)

SOLVES = [
    triangular("left lower", real(3, 3), real(3, 2), left_side=True, lower=True),
    triangular("left upper transposed", real(2, 3, 3), real(2, 3, 5), left_side=True,
               transpose_a=True),
    triangular("right lower", real(3, 3), real(2, 3), lower=True, unit_diagonal=True),
    triangular("right upper transposed", real(3, 3), real(5, 3), transpose_a=True),
    triangular("complex adjoint", complex_(3, 3), complex_(3, 2), left_side=True, lower=True,
               transpose_a=True, conjugate_a=True),
    triangular("complex conjugate", complex_(3, 3), complex_(2, 3), conjugate_a=True),
    row("triangular_solve", lambda b: linalg.triangular_solve(jnp.eye(3, dtype=b.dtype) * 2, b),
        real(2, 3), "right hand side"),
    row("triangular_solve", lambda a: linalg.triangular_solve(a, jnp.ones((2, 3), a.dtype)),
        dominant(real(3, 3)), "matrix"),
    row("tridiagonal_solve", linalg.tridiagonal_solve,
        (real(5), lambda rng: 5 + rng.standard_normal(5), real(5), real(5, 2))),
    row("tridiagonal_solve", linalg.tridiagonal_solve,
        (complex_(2, 3), lambda rng: 5 + rng.standard_normal((2, 3)) + 0j, complex_(2, 3),
         complex_(2, 3, 2)), "complex batch"),
    row("tridiagonal_solve",
        lambda b: linalg.tridiagonal_solve(*(jnp.full((3,), c, b.dtype) for c in (1, 4, -1)), b),
        real(3, 2), "right hand side"),
]

FACTORS = [
    row("cholesky", linalg.cholesky, definite(3)),
    row("cholesky", linalg.cholesky, definite(3, 2), "batch"),
    row("cholesky", linalg.cholesky, hermitian(3), "complex"),
    row("cholesky", of_sum(linalg.cholesky), hermitian(3), "sum"),
    row("lu", only_factors, dominant(real(3, 3))),
    row("lu", only_factors, real(2, 5, 3), "tall"),
    row("lu", only_factors, real(2, 3, 5), "wide"),
    row("lu", only_factors, dominant(complex_(3, 3)), "complex"),
    row("qr", qr, real(3, 3)),
    row("qr", qr, real(2, 5, 3), "tall"),
    row("qr", qr, real(2, 3, 5), "wide"),
    row("qr", qr, complex_(5, 3), "complex tall"),
    row("qr", qr, complex_(3, 5), "complex wide"),
    row("qr", linalg.qr, real(5, 3), "full"),
    row("qr", linalg.qr, complex_(5, 3), "complex full"),
    row("qr", linalg.qr, real(3, 5), "full wide"),
    row("qr", pivoted, uneven(real(5, 3)), "pivoting"),
    row("qr", pivoted, uneven(complex_(5, 3)), "complex pivoting"),
]



def svd_bytes(m, n, batch=1, item=8):
    """Thin U, S and V."""
    k = min(m, n)
    return batch * (8 * k + item * k * (m + n))


def eig_bytes(n, batch=1, sides=1):
    """Eigenvalues and vectors, complex."""
    return batch * 16 * (n + sides * n * n)


SPECTRA = [
    vectors("svd", thin, spread(real(3, 3)), kept=svd_bytes(3, 3)),
    vectors("svd", linalg.svd, spread(real(3, 3)), "full", kept=svd_bytes(3, 3)),
    vectors("svd", thin, spread(real(2, 5, 3)), "tall", kept=svd_bytes(5, 3, 2)),
    vectors("svd", thin, spread(real(2, 3, 5)), "wide", kept=svd_bytes(3, 5, 2)),
    vectors("svd", thin, spread(complex_(3, 3)), "complex phases", differences=False,
            kept=svd_bytes(3, 3, item=16)),
    row("svd", projections, spread(complex_(5, 3)), "complex tall",
        kept=svd_bytes(5, 3, item=16) + 16 * 3 * (5 + 3)),
    row("svd", projections, spread(complex_(3, 5)), "complex wide",
        kept=svd_bytes(3, 5, item=16) + 16 * 3 * (3 + 5)),
    row("svd", projections, spread(real(5, 3)), "outer",
        kept=svd_bytes(5, 3) + 8 * 3 * (5 + 3)),
    row("svd", values, spread(real(2, 3, 5)), "values", kept=svd_bytes(3, 5, 2)),
    row("svd", values, spread(complex_(5, 3)), "complex values", kept=svd_bytes(5, 3, item=16)),
    vectors("eigh", linalg.eigh, spread(real(3, 3))),
    vectors("eigh", with_form(linalg.eigh, lower=False), spread(real(2, 3, 3)), "upper"),
    row("eigh", of_sum(lambda a, **form: jnp.abs(linalg.eigh(a, **form)[0])), spread(real(3, 3)),
        "one triangle"),
    row("eigh", sizes, spread(complex_(3, 3)), "complex"),
    row("eigh", lambda a: linalg.eigh(a)[1], spread(complex_(3, 3)), "complex values"),
    row("eig", eigenvalues, spread(real(3, 3)), "values", order=1, kept=eig_bytes(3)),
    row("eig", eigenvalues_twice, spread(real(2, 3, 3)), "values twice", kept=eig_bytes(3, 2)),
    row("eig", eigenvalues_twice, spread(complex_(3, 3)), "complex values", kept=eig_bytes(3)),
    vectors("eig", eig, spread(real(3, 3)), kept=eig_bytes(3, sides=2)),
    vectors("eig", eig, spread(complex_(3, 3)), "complex", kept=eig_bytes(3, sides=2)),
    vectors("eig", with_form(eig, compute_right_eigenvectors=False), spread(real(3, 3)), "left",
            kept=eig_bytes(3, sides=2)),
    vectors("eig", with_form(eig, compute_left_eigenvectors=False), spread(real(2, 3, 3)), "right",
            kept=eig_bytes(3, 2)),
]


def newer():
    """jax 0.10 gives the raw primitive a cotangent outside the triangle that is read."""
    raw = with_form(linalg.cholesky, symmetrize_input=False)
    return [row("cholesky", raw, definite(3), "one triangle"),
            row("cholesky", raw, hermitian(3), "complex one triangle")]


CASES = [*SOLVES, *FACTORS, *SPECTRA, *(newer() if NEWER else ())]
