"""What has no derivative says so; what JAX refuses or gets wrong is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop.check import compare, finite_differences, random_cotangent

MATRIX = np.random.default_rng(0).standard_normal((5, 3)) + 3 * np.eye(5, 3)


def total(fun):
    return lambda *args: sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(fun(*args)))


def agrees_with_differences(fun, value):
    primals = (jnp.asarray(value),)
    cotangent = random_cotangent(jax.eval_shape(fun, *primals))
    got = fbprop.vjp(fun, *primals)[1](cotangent)
    (row,) = compare(primals, got, finite_differences(fun, primals, cotangent), "differences", 1e-8)
    assert row.ok, row


@pytest.mark.parametrize("parameter", ["a", "b"])
def test_incomplete_beta_in_its_parameters(x64, parameter):
    values = {"a": 1.5, "b": 2.5, "x": 0.5}
    fun = lambda p: lax.betainc(**{**values, parameter: p})
    with pytest.raises(NotImplementedError, match=f"asked for in '{parameter}' expected it"):
        fbprop.grad(fun)(1.5)


def test_polygamma_in_its_order(x64):
    with pytest.raises(NotImplementedError, match="polygamma has a derivative in its last operand"):
        fbprop.grad(lambda m: lax.polygamma(m, 1.5))(1.0)


def test_vectors_of_a_full_svd(x64):
    with pytest.raises(NotImplementedError, match=r"got full_matrices=True.*take the thin"):
        fbprop.grad(total(lax.linalg.svd))(MATRIX)


def test_values_of_a_full_svd_are_those_of_a_thin_one(x64):
    full = fbprop.grad(lambda a: jnp.sum(lax.linalg.svd(a)[1] ** 2))(MATRIX)
    np.testing.assert_allclose(full, 2 * MATRIX, rtol=1e-12)


def test_eigenvectors_of_a_general_matrix_unless_asked_for(x64):
    with pytest.raises(NotImplementedError, match="got enable_eigvec_derivs=False expected True"):
        fbprop.grad(total(lax.linalg.eig))(MATRIX[:3])


def test_eigenvalues_need_no_permission(x64):
    trace = lambda a: jnp.real(jnp.sum(lax.linalg.eig(a)[0]))
    np.testing.assert_allclose(fbprop.grad(trace)(MATRIX[:3]), np.eye(3), atol=1e-12)


def test_a_part_of_the_eigenvectors(x64):
    """Traced only: no CPU computes a part."""
    part = total(lambda a: lax.linalg.eigh(a, subset_by_index=(0, 2)))
    with pytest.raises(NotImplementedError, match=r"got subset_by_index=\(0, 2\) expected None"):
        jax.eval_shape(fbprop.grad(part), MATRIX[:3])


def test_equal_eigenvalues_have_a_gradient_without_vectors(x64):
    largest = lambda a: jnp.sum(lax.linalg.eigh(a)[1] ** 2)
    np.testing.assert_allclose(fbprop.grad(largest)(np.eye(3)), 2 * np.eye(3), atol=1e-12)


@pytest.mark.parametrize("imaginary", [0.0, 1j])
def test_a_wide_qr_with_pivoting(x64, imaginary):
    """JAX 0.10.2 and 0.12.0.1 take the columns beside the square block unpivoted."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 5)) + imaginary * rng.standard_normal((3, 5))
    agrees_with_differences(
        lambda a: lax.linalg.qr(a, pivoting=True, full_matrices=False)[:2], a * 4.0 ** np.arange(5)
    )


@pytest.mark.parametrize("fun", [lax.sign, lax.acosh])
def test_complex_functions_that_jax_0_10_gets_wrong(x64, fun):
    """Its sign has gradient 0; its acosh has the wrong sign where Re x < 0."""
    agrees_with_differences(fun, np.array([[-1.5 + 0.5j, 0.3 - 0.7j], [-0.2 + 2.0j, 2.0 + 0.1j]]))


def test_nextafter_which_jax_0_10_does_not_differentiate(x64):
    agrees_with_differences(lambda x: lax.nextafter(x, 2 * x), np.array([0.5, -1.25]))
