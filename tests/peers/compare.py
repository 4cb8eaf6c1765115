"""Value and gradient of a model that is not ours: fbprop against JAX, eager and jitted."""

import jax
import jax.numpy as jnp
import numpy as np

import fbprop

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def cast(tree, dtype):
    """Floating-point leaves in this precision."""
    def leaf(x):
        is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(x, dtype) if is_float else x

    return jax.tree.map(leaf, tree)


def assert_same_gradient(loss, params, dtype):
    """``loss(params)`` and its gradient agree, relative to each leaf's largest element."""
    expected, gradient = jax.jit(jax.value_and_grad(loss))(params)
    for run in (fbprop.value_and_grad(loss), jax.jit(fbprop.value_and_grad(loss))):
        value, got = run(params)
        np.testing.assert_allclose(value, expected, rtol=TOLERANCE[dtype])
        assert jax.tree.structure(got) == jax.tree.structure(gradient)
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
        assert largest > 0
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradient)):
            # A leaf whose true gradient is 0 (a bias before a normalisation or a softmax) holds
            # rounding errors of the whole gradient, 1e-7 of it in float32: compared on its scale.
            scale = max(float(jnp.abs(b).max()), 1e-2 * largest)
            error = float(jnp.abs(a - b).max()) / scale
            assert error <= TOLERANCE[dtype], f"{b.shape}: {error:.1e} of {scale:.1e}"
