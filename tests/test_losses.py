"""Losses and accuracy against their formulas in NumPy, and their gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import nn, ops


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


LABELS = jnp.array([[0, 2, 1], [1, 1, 0]])


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_cross_entropy_equals_its_formula(x64, smoothing):
    logits = normal((2, 3, 5))
    target = np.eye(5)[np.asarray(LABELS)] * (1 - smoothing) + smoothing / 5
    losses = -(target * log_softmax(np.asarray(logits))).sum(-1)
    loss = lambda logits, where=None: nn.softmax_cross_entropy(
        logits, LABELS, label_smoothing=smoothing, where=where)
    np.testing.assert_allclose(loss(logits), losses.mean(), rtol=1e-12)
    shares = ops.softmax_cross_entropy(logits, jnp.eye(5)[LABELS], label_smoothing=smoothing)
    np.testing.assert_allclose(shares, losses, rtol=1e-12)
    mask = np.array([[True, False, True], [False, False, True]])
    np.testing.assert_allclose(loss(logits, jnp.asarray(mask)), losses[mask].mean(), rtol=1e-12)
    expected = jax.jit(jax.grad(loss))(logits)
    chex.assert_trees_all_close(fbprop.grad(loss)(logits), expected, rtol=1e-12)


def test_losses_are_stable_and_of_float32_at_least():
    logits = jnp.array([[1000.0, 0.0], [-1000.0, 0.0]])
    assert float(nn.softmax_cross_entropy(logits, jnp.array([0, 0]))) == 500.0
    half = jnp.full((1, 3), 7.0, jnp.bfloat16)
    assert nn.softmax_cross_entropy(half, jnp.array([1])).dtype == jnp.float32
    assert nn.mean_squared_error(half, -half).dtype == jnp.float32
    large = jnp.full(3, 300.0, jnp.float16)  # its square is beyond float16's 65,504
    assert float(nn.mean_squared_error(large, jnp.zeros_like(large))) == 90000.0
    assert np.isnan(nn.softmax_cross_entropy(logits, jnp.array([0, 2])))


def test_mean_squared_error_equals_its_formula(x64):
    a, b = normal((3, 5)), normal((3, 5), seed=1)
    squares = np.square(np.asarray(a) - np.asarray(b))
    np.testing.assert_allclose(nn.mean_squared_error(a, b), squares.mean(), rtol=1e-12)
    some = np.arange(15).reshape(3, 5) % 2 == 0
    np.testing.assert_allclose(
        nn.mean_squared_error(a, b, where=jnp.asarray(some)), squares[some].mean(), rtol=1e-12
    )
    chex.assert_trees_all_close(
        *(jax.jit(ad.grad(nn.mean_squared_error))(a, b) for ad in (fbprop, jax)), rtol=1e-12
    )


def test_accuracy_counts():
    logits = jnp.array([[0.0, 1.0], [3.0, 1.0], [2.0, 2.0], [0.0, 1.0]])
    labels = jnp.array([1, 1, 0, 0])
    assert float(nn.accuracy(logits, labels)) == 0.5
    assert float(nn.accuracy(logits, labels, where=jnp.array([True, False, True, False]))) == 1.0


X = jnp.ones((2, 3))
ERRORS = {
    "smoothing": (ValueError, "label_smoothing is a share of the target, got 1 expected",
                  lambda: nn.softmax_cross_entropy(X, jnp.array([0, 1]), label_smoothing=1)),
    "label_dtype": (TypeError, "softmax_cross_entropy.*got labels of dtype float32",
                    lambda: nn.softmax_cross_entropy(X, jnp.ones(2))),
    "label_shape": (ValueError, r"accuracy.*got labels of shape \(3,\) expected \(2,\)",
                    lambda: nn.accuracy(X, jnp.array([0, 1, 2]))),
    "mse_shape": (ValueError, r"got targets of shape \(2,\) expected \(2, 3\)",
                  lambda: nn.mean_squared_error(X, jnp.ones(2))),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
