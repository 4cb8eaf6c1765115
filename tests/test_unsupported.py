"""What has no derivative says so, and what JAX refuses but has one."""

import fbprop
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

MATRIX = np.random.default_rng(0).standard_normal((5, 3)) + 3 * np.eye(5, 3)


def total(fun):
    return lambda *args: sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(fun(*args)))


@pytest.mark.parametrize("parameter", ["a", "b"])
def test_incomplete_beta_in_its_parameters(x64, parameter):
    values = {"a": 1.5, "b": 2.5, "x": 0.5}
    fun = lambda p: lax.betainc(**{**values, parameter: p})
    with pytest.raises(NotImplementedError, match=f"asked for in '{parameter}' expected"):
        fbprop.grad(fun)(1.5)


def test_polygamma_in_its_order(x64):
    with pytest.raises(NotImplementedError, match="polygamma has a derivative in its last operand"):
        fbprop.grad(lambda m: lax.polygamma(m, 1.5))(1.0)


def test_vectors_of_a_full_svd(x64):
    with pytest.raises(NotImplementedError, match="got full_matrices=True.*take the thin"):
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
