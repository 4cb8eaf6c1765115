"""What rules do where JAX has no derivative to compare a row with: errors, and wider support."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop.check import compare

GROUPS = jnp.array([3, 4], jnp.int32)


def test_products_at_repeated_indices(x64):
    """Each update gets the product of all others at its place, also where some are 0."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 2)))
    u = jnp.asarray(rng.standard_normal((6, 2))).at[1].set(0)
    indices = np.array([2, 0, 2, 7, 2, 0])  # 7 is out of bounds and dropped
    weights = jnp.asarray(rng.standard_normal(x.shape))

    def scattered(x, u):
        return jnp.sum(weights * x.at[indices].multiply(u) ** 2)

    def multiplied(x, u):
        rows = [jnp.prod(u[np.flatnonzero(indices == i)], axis=0) for i in range(4)]
        return jnp.sum(weights * (x * jnp.stack(rows)) ** 2)

    def slopes(ad, fun):
        second = ad.grad(lambda u: jnp.sum(ad.grad(fun, argnums=1)(x, u)))
        return ad.grad(fun, argnums=(0, 1))(x, u), second(u)

    got, expected = jax.jit(lambda: (slopes(fbprop, scattered), slopes(jax, multiplied)))()
    chex.assert_trees_all_close(got, expected, rtol=1e-12)


def test_scatter_of_a_function_has_no_derivative():
    with pytest.raises(NotImplementedError, match="A scatter that applies a function"):
        fbprop.grad(lambda x: jnp.sum(x.at[jnp.array([0])].apply(jnp.sin)))(jnp.ones(3))


def test_ragged_batches_have_no_derivative():
    numbers = lax.RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), [0], [])

    def f(x):
        return jnp.sum(lax.ragged_dot_general(x, jnp.ones((7, 5, 2)), GROUPS, numbers))

    with pytest.raises(NotImplementedError, match="ragged dimension is free or contracted"):
        fbprop.grad(f)(jnp.ones((7, 3, 5)))


def test_ragged_product_has_a_second_derivative(x64):
    """JAX has none, so the same rows are multiplied group by group."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((7, 3)), rng.standard_normal((2, 3, 5))

    def second(product, grad):
        def once(x, w):
            first = grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), (0, 1))(x, w)
            return sum(jnp.sum(jnp.cos(d)) for d in first)

        return jax.jit(grad(once, (0, 1)))(x, w)

    got = second(lambda x, w: lax.ragged_dot(x, w, GROUPS), fbprop.grad)
    expected = second(lambda x, w: jnp.concatenate([x[:3] @ w[0], x[3:] @ w[1]]), jax.grad)
    found = compare((x, w), got, expected, "jax, by group", 1e-12)
    assert all(row.ok for row in found), "\n".join(map(str, found))


def test_reduction_with_an_index_and_an_initial_value(x64):
    """The index has no cotangent; the initial value, which takes part, has one."""

    def reducer(p, q):
        left = p[0] >= q[0]
        return jnp.where(left, p[0], q[0]), jnp.where(left, p[1], q[1])

    def largest(x, initial):
        where = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        value, _ = lax.reduce((x, where), (initial, jnp.int32(-1)), reducer, (0,))
        return value

    x = jnp.array([[1.0, 5.0], [3.0, -2.0], [2.0, -3.0]])
    dx, initial = fbprop.vjp(largest, x, jnp.array(4.0))[1](jnp.array([2.0, 3.0]))
    np.testing.assert_array_equal(dx, [[0.0, 3.0], [0.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(initial, 2.0)


def test_empty_operands(x64):
    assert fbprop.grad(lambda x: jnp.sum(jnp.prod(x, 1)))(jnp.ones((3, 0))).shape == (3, 0)
    dx = fbprop.grad(lambda x: jnp.sum(lax.slice(x, (3, 1), (3, 4))))(jnp.ones((5, 7)))
    np.testing.assert_array_equal(dx, np.zeros((5, 7)))


def test_standardize_where_rounding_leaves_no_variance():
    """In float32 Σ x² / n = μ² here, however it is summed: max(0, 0) has slope 1/2."""
    x, dy = jnp.array([4097.0, 4095.0]), jnp.array([1.0, -2.0])
    assert jnp.mean(x**2) == jnp.mean(x) ** 2
    (got,), (theirs,) = (ad.vjp(jax.nn.standardize, x)[1](dy) for ad in (fbprop, jax))
    y = np.array([1.0, -1.0]) / np.sqrt(1e-5)
    exact = (dy - np.mean(dy) - y * np.mean(dy * y) / 2) / np.sqrt(1e-5)
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    # JAX's is a difference of numbers 4096 times as large.
    np.testing.assert_allclose(theirs, exact, rtol=4096 * 2**-23)


def test_a_powers_slope_in_its_base_has_one_in_an_exponent_of_zero(x64):
    """∂/∂n n xⁿ⁻¹ = 1 / x at n = 0; where that is not finite, 0 as the slope in x."""
    x = jnp.array([4.0, 0.5, 3.0, 0.0, 1e-310])
    n = jnp.array([0.0, 0.0, 2.0, 0.0, 0.0])
    slope = fbprop.grad(lax.pow)
    compute = jax.jit(jax.vmap(lambda x, n: (slope(x, n), fbprop.grad(slope, 1)(x, n))))
    first, second = compute(x[:4], n[:4])
    np.testing.assert_array_equal(first, [0, 0, 6, 0])
    np.testing.assert_allclose(second[:3:2], [0.25, 3 + 6 * np.log(3)], rtol=1e-14)
    assert second[3] == 0
    assert slope(x[4], n[4]) == 0
