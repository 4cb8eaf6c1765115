"""Curvature: against `jax.hessian` and every example's own gradient, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from fbprop.watch import curvature

pytestmark = pytest.mark.usefixtures("x64")
B = 5
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def network(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def cross_entropy(logits, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1))


def squared(outputs, y):
    return jnp.mean((outputs - y) ** 2)


def problem():
    params = {"w": normal(0, 3, 2), "b": normal(1, 2), "v": normal(2, 2, 3)}
    return params, normal(3, B, 3), jnp.array([0, 1, 2, 1, 0])


def block_of(matrix, params, name):
    """The part of a matrix over all parameters that is one parameter's."""
    at = ravel_pytree(jax.tree.map(lambda p: jnp.full(p.shape, 0.0), params) | {
        name: jnp.ones(params[name].shape)})[0] > 0
    return np.asarray(matrix)[np.ix_(at, at)]


def exact_ggn(params, x, loss, *y):
    flat, unflat = ravel_pytree(params)
    outputs = lambda flat: network(unflat(flat), x)
    jacobian = jax.jacobian(outputs)(flat).reshape(-1, flat.size)
    of_outputs = lambda o: loss(o.reshape(B, -1), *y)
    hessian = jax.jit(jax.hessian(of_outputs))(outputs(flat).reshape(-1))
    return jacobian.T @ hessian @ jacobian


@pytest.mark.parametrize(("loss", "root"), [
    (cross_entropy, None), (cross_entropy, curvature.softmax_root), (squared, None),
    (squared, curvature.squared_root),
])
def test_gauss_newton_diagonals_and_blocks(loss, root):
    params, x, y = problem()
    y = y if loss is cross_entropy else normal(4, B, 3)
    *found, expected = jax.jit(lambda p, x, y: (
        curvature.ggn(network, loss, "diagonal", root=root)(p, x, y),
        curvature.ggn(network, loss, "blocks", root=root)(p, x, y), exact_ggn(p, x, loss, y),
    ))(params, x, y)
    for name, p in params.items():
        block = block_of(expected, params, name)
        np.testing.assert_allclose(found[1][name], block, **CLOSE)
        np.testing.assert_allclose(found[0][name], np.diag(block).reshape(p.shape), **CLOSE)


def test_fisher_diagonals_and_blocks():
    params, x, y = problem()
    loss = lambda p, x, y: cross_entropy(network(p, x), y)
    one = lambda p, x, y: loss(p, x[None], y[None])
    gradients, diagonal, blocks = jax.jit(lambda *args: (
        jax.vmap(jax.grad(one), (None, 0, 0))(*args), curvature.fisher(loss)(*args),
        curvature.fisher(loss, "blocks")(*args),
    ))(params, x, y)
    for name, g in gradients.items():
        flat = g.reshape(B, -1)
        np.testing.assert_allclose(blocks[name], flat.T @ flat / B, **CLOSE)
        np.testing.assert_allclose(diagonal[name], jnp.mean(g**2, 0), **CLOSE)


def test_kronecker_factors_of_one_example_are_the_block():
    """With one example, one output and one place there is nothing to approximate."""
    params, x, _ = problem()
    out = lambda p, x: network(p, x)[:, :1]
    y = normal(5, 1, 1)
    exact, found = jax.jit(lambda *args: [
        curvature.ggn(out, squared, kind)(*args) for kind in ("blocks", "kronecker")
    ])(params, x[:1], y)
    for name, block in exact.items():
        np.testing.assert_allclose(found[name].dense(), block, **CLOSE)
    assert isinstance(found["w"], curvature.Kronecker)
    assert isinstance(found["b"], curvature.Block)


def test_kronecker_factors_of_a_batch():
    """A = E xxᵀ of the inputs, G the Gauss-Newton matrix of the product's result."""
    params, x, y = problem()
    found = jax.jit(curvature.ggn(network, cross_entropy, "kronecker"))(params, x, y)["v"]
    h = jnp.tanh(x @ params["w"] + params["b"])
    p = jax.nn.softmax(h @ params["v"])
    g = jnp.mean(jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None], 0)
    np.testing.assert_allclose(found.dense(), jnp.kron(h.T @ h / B, g), **CLOSE)


@pytest.mark.parametrize("mode", ["expand", "reduce"])
def test_factors_of_a_weight_shared_over_time(mode):
    w, x, c = normal(0, 3, 2), normal(1, B, 4, 3), normal(2, 4, 2)
    loss = lambda w, x: jnp.mean(jnp.sum(jnp.sin(x @ w) * c, (1, 2)))
    found = jax.jit(curvature.fisher(loss, "kronecker", mode=mode))(w, x)
    dy = jnp.cos(x @ w) * c
    if mode == "expand":
        a = jnp.einsum("btd,bte->de", x, x) / (B * 4)
        g = jnp.einsum("btd,bte->de", dy, dy) / B
    else:
        mean, total = jnp.mean(x, 1), jnp.sum(dy, 1)
        a, g = mean.T @ mean / B, total.T @ total / B
    np.testing.assert_allclose(found.dense(), jnp.kron(a, g), **CLOSE)


def gradient_and_factors(loss, *args):
    return jax.jit(lambda *args: (
        jax.jit(jax.grad(loss))(*args).reshape(-1), curvature.fisher(loss, "kronecker")(*args)
    ))(*args)


def test_factors_of_a_convolution_and_a_table():
    """A kernel as large as the image, and one row looked up, are dense layers."""
    k, x, c = normal(0, 3, 2, 2, 4), normal(1, 1, 3, 2, 2), normal(2, 4)

    def convolved(k, x):
        y = lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.mean(jnp.sin(y) @ c)

    g, found = gradient_and_factors(convolved, k, x)
    np.testing.assert_allclose(found.dense(), jnp.outer(g, g), **CLOSE)
    np.testing.assert_allclose(found.times(k).reshape(-1), g * (g @ k.reshape(-1)), **CLOSE)
    table = normal(3, 5, 4)
    looked = lambda table, i: jnp.mean(jnp.sin(table[i]) @ c)
    g, found = gradient_and_factors(looked, table, jnp.array([2]))
    np.testing.assert_allclose(found.dense(), jnp.outer(g, g), **CLOSE)


def test_inverses():
    params, x, y = problem()
    loss = lambda p, x, y: cross_entropy(network(p, x), y)
    damping = 0.1
    found = jax.jit(curvature.fisher(loss, "kronecker"))(params, x, y)
    block = found["b"].inverse(damping)
    expected = np.linalg.inv(found["b"].dense() + damping * np.eye(2))
    np.testing.assert_allclose(block.dense(), expected, **CLOSE)
    a, g = found["w"].a, found["w"].g
    ratio = np.sqrt(np.trace(a) / 3 / (np.trace(g) / 2))
    a = a + ratio * damping**0.5 * np.eye(3)
    g = g + damping**0.5 / ratio * np.eye(2)
    inverse = found["w"].inverse(damping)
    np.testing.assert_allclose(inverse.dense(), np.linalg.inv(np.kron(a, g)), **CLOSE)
    v = normal(7, 3, 2)
    np.testing.assert_allclose(
        inverse.times(v).reshape(-1), inverse.dense() @ v.reshape(-1), **CLOSE)


def test_random_signs_are_right_on_average():
    params, x, y = problem()
    options = {"root": curvature.softmax_root}
    exact = jax.jit(curvature.ggn(network, cross_entropy, **options))(params, x, y)
    sampled = jax.jit(curvature.ggn(network, cross_entropy, samples=400, **options))
    found = sampled(params, x, y, key=jax.random.key(0))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact)):
        np.testing.assert_allclose(a, b, rtol=0.2, atol=0.01)


def test_products_and_what_they_tell():
    params, x, y = problem()
    loss = lambda p, x, y: cross_entropy(network(p, x), y)
    flat, unflat = ravel_pytree(params)
    v = normal(6, flat.size)
    hessian, ggn = jax.jit(lambda flat: (
        jax.jit(jax.hessian(lambda flat: loss(unflat(flat), x, y)))(flat),
        exact_ggn(unflat(flat), x, cross_entropy, y),
    ))(flat)

    @jax.jit
    def run(params, v, key):
        of_hessian = lambda v: curvature.hessian_vector(loss)(params, v, x, y)
        of_ggn = lambda v: curvature.ggn_vector(network, cross_entropy)(params, v, x, y)
        return (
            of_hessian(v), of_ggn(v), curvature.top_eigenvalue(of_hessian, params, key),
            curvature.top_eigenvalue(of_ggn, params, key, steps=14),
            curvature.hutchinson(of_ggn, params, key, samples=2000),
        )

    by_hessian, by_ggn, top, top_ggn, (diagonal, trace) = run(params, unflat(v), jax.random.key(0))
    np.testing.assert_allclose(ravel_pytree(by_hessian)[0], hessian @ v, **CLOSE)
    np.testing.assert_allclose(ravel_pytree(by_ggn)[0], ggn @ v, **CLOSE)
    np.testing.assert_allclose(top, np.linalg.eigvalsh(hessian)[-1], rtol=1e-8)
    np.testing.assert_allclose(top_ggn, np.linalg.eigvalsh(ggn)[-1], rtol=1e-8)
    np.testing.assert_allclose(trace, np.trace(ggn), rtol=0.1)
    np.testing.assert_allclose(ravel_pytree(diagonal)[0], np.diag(ggn), atol=0.05)


def test_the_top_eigenvalue_of_negative_matrices():
    """Of a space that is exhausted early too: two eigenvalues in five dimensions."""
    scale = jnp.array([-2.0, -2.0, -3.0, -3.0, -3.0])
    found = curvature.top_eigenvalue(lambda v: scale * v, scale, jax.random.key(0))
    np.testing.assert_allclose(found, -2, rtol=1e-8)


def test_bad_arguments():
    with pytest.raises(ValueError, match="The kind of curvature is one of"):
        curvature.fisher(network, "full")
    with pytest.raises(ValueError, match="The mode of curvature is one of"):
        curvature.ggn(network, squared, mode="both")
    params, x, y = problem()
    with pytest.raises(ValueError, match="Signs are drawn with a key"):
        curvature.ggn(network, cross_entropy, samples=1)(params, x, y)
    with pytest.raises(ValueError, match="one sample or more"):
        curvature.hutchinson(lambda v: v, jnp.ones(2), jax.random.key(0), samples=0)
    with pytest.raises(ValueError, match="one step or more"):
        curvature.top_eigenvalue(lambda v: v, jnp.ones(2), jax.random.key(0), steps=0)
