"""Primitives that JAX differentiates for us, and those that nobody can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import fbprop


@pytest.mark.parametrize("callback", [
    lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), "float32"), x),
    lambda x: io_callback(np.sin, jax.ShapeDtypeStruct((), "float32"), x),
])
def test_callbacks_are_refused_where_a_derivative_would_pass(callback):
    with pytest.raises(ValueError, match="callbacks have no derivative, got .* jax.custom_vjp"):
        fbprop.grad(callback)(0.5)
    np.testing.assert_allclose(
        fbprop.grad(lambda x: x * callback(jax.lax.stop_gradient(x)))(0.5), np.sin(0.5), rtol=1e-6
    )


def test_a_windowed_reduction_of_the_users_is_refused_in_jax_and_here():
    def fun(x):
        multiply = lambda a, b: a * b + 0.0 * a
        return jnp.sum(jax.lax.reduce_window(x, 1.0, multiply, (2,), (1,), "VALID"))

    with pytest.raises(ValueError, match="Linearization failed"):
        jax.grad(fun)(jnp.ones(3))
    with pytest.raises(ValueError, match="other than max, min and sum have no derivative, got"):
        fbprop.grad(fun)(jnp.ones(3))


def test_looking_at_values_changes_nothing():
    def fun(x):
        y = jnp.sin(x)
        jax.debug.callback(lambda _: None, y)
        return y * y

    np.testing.assert_allclose(fbprop.grad(fun)(0.3), jnp.sin(0.6), rtol=1e-6)
