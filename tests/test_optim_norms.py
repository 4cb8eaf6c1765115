"""Norms at the ends of their dtype's range: what clips, and what divides by a norm."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import optim

PAIR = np.array([0.6, -0.8])
# Times PAIR: lengths whose squares are ordinary, infinite, or 0 in float32.
SIZES = [5.0, 5e20, 3e38, 5e-30, 1e-36]


def tree(pair, dtype=np.float32):
    """One vector over two leaves, an empty one and a hole."""
    a, b = jnp.asarray(pair.astype(dtype))
    return {"a": a[None], "b": [b, jnp.zeros((0, 3), dtype), None]}


def vector(tree):
    return np.array([np.asarray(x).reshape(-1)[0] for x in jax.tree.leaves(tree) if x.size])


@jax.jit
def clipped(grads):
    parts = {
        "all": optim.clip_by_global_norm(1.0), "leaf": optim.clip_by_leaf_norm(1.0),
        "rms": optim.clip_by_leaf_rms(1.0), "tiny": optim.clip_by_global_norm(1e-20),
    }
    norms = {"norm": optim.global_norm(grads)}
    return {name: part.update(grads, ())[0] for name, part in parts.items()} | norms


@pytest.mark.parametrize("size", SIZES)
def test_clipping_reaches_the_ends_of_float32(size):
    got = clipped(tree(PAIR * size))
    np.testing.assert_allclose(got["norm"], size, rtol=1e-6)
    np.testing.assert_allclose(vector(got["all"]), PAIR * min(1, size), rtol=1e-6)
    for one in ("leaf", "rms"):
        each = np.sign(PAIR) * np.minimum(np.abs(PAIR) * size, 1)
        np.testing.assert_allclose(vector(got[one]), each, rtol=1e-6)
    np.testing.assert_allclose(vector(got["tiny"]), PAIR * min(1e-20, size), rtol=1e-6)


def test_the_ends_of_other_dtypes(x64):
    run = jax.jit(lambda g: optim.clip_by_global_norm(1.0).update(g, ())[0])
    for dtype, size in [(np.float16, 6e4), (np.float64, 1e308), (np.complex64, 3e38)]:
        turn = 1j if np.dtype(dtype).kind == "c" else 1
        got = run(tree(PAIR * size * turn, dtype))
        expected = PAIR * turn
        np.testing.assert_allclose(vector(got), expected.astype(vector(got).dtype), rtol=4e-3)
    # float32 and float64 leaves together, the one far from the other
    mixed = run({"a": jnp.float32([3e38]), "b": jnp.float64([4e300])})
    np.testing.assert_allclose(vector(mixed), [0, 1], atol=1e-12)


def test_nothing_has_norm_0_and_stays_nothing():
    for nothing in ({}, [jnp.zeros((0, 3))], [jnp.zeros(2)], None):
        got = clipped(nothing)
        assert got["norm"] == 0
        chex.assert_trees_all_equal(got["all"], nothing)
        chex.assert_trees_all_equal(got["rms"], nothing)


def test_what_is_not_finite_shows_as_in_optax():
    """Infinite elements become nan, the finite ones beside them 0; with nan, all is nan."""
    for pair, expected in [((np.inf, 1.0), (np.nan, 0)), ((1.0, -np.inf), (0, np.nan)),
                           ((np.nan, 1.0), (np.nan, np.nan))]:
        np.testing.assert_array_equal(vector(clipped(tree(np.array(pair)))["all"]), expected)


def of_pair(fun):
    return lambda pair: jnp.vdot(jnp.array([1.0, 2.0]), fun(pair))


@pytest.mark.parametrize("grad", [jax.grad, fbprop.grad])
def test_derivatives_at_zero_and_far_from_it(grad):
    """At 0 the identity for clipping and 0 for the norm; c (w − u u·w) / |g| over the limit."""
    w = np.array([1.0, 2.0])
    trust = optim.scale_by_trust_ratio()
    functions = {
        "clip": of_pair(lambda g: optim.clip_by_global_norm(1.0).update(g, ())[0]),
        "rms": of_pair(lambda g: optim.clip_by_leaf_rms(0.5**0.5).update(g, ())[0]),
        "trust": of_pair(
            lambda g: trust.update(g, trust.init(g), jnp.array([0.0, 1.0]))[0]
        ),
        "norm": optim.global_norm,
    }
    run = jax.jit(lambda g: {name: grad(f)(g) for name, f in functions.items()})
    at_zero = run(jnp.zeros(2))
    expected = {"clip": w, "rms": w, "trust": w, "norm": np.zeros(2)}
    chex.assert_trees_all_close(at_zero, expected, rtol=1e-6)
    for size in (5.0, 5e15, 5e20, 3e38):
        turned = (w - PAIR * (PAIR @ w)) / size
        expected = {"clip": turned, "rms": turned, "trust": turned, "norm": PAIR}
        got = run(jnp.asarray(PAIR * size, jnp.float32))
        # Differences of numbers about 1/size, and the smallest ones are rounded to 0.
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=2e-6 / size + 1e-38)


def test_trust_ratios_at_the_ends_of_the_range():
    part = optim.scale_by_trust_ratio()
    run = jax.jit(lambda u, p: part.update(u, part.init(p), p)[0])
    for size in SIZES:
        for length in (5.0, 5e20, 5e-20):
            got = run(jnp.float32(PAIR * size), jnp.float32([0, length]))
            np.testing.assert_allclose(got, PAIR * length, rtol=2e-6)
    assert np.isnan(run(jnp.array([jnp.nan, 1.0]), jnp.ones(2))).all()


def test_adafactor_and_muon_at_the_ends_of_the_range():
    scaled = optim.adafactor(1.0, clipping_threshold=None)
    run = jax.jit(lambda p: scaled.update(jnp.ones(2), scaled.init(p), p)[0])
    np.testing.assert_allclose(run(jnp.full(2, 3e20)), [-3e20, -3e20], rtol=1e-6)
    big, small = (jnp.array([[3.0, 1.0], [0.0, 2.0]]) * size for size in (1e20, 1.0))
    np.testing.assert_allclose(optim.orthogonalize(big), optim.orthogonalize(small), rtol=1e-5)
    zero = jnp.zeros((2, 2))
    np.testing.assert_array_equal(optim.orthogonalize(zero, eps=0.0), zero)


def test_orthogonalize_takes_complex_matrices():
    x = jax.random.normal(jax.random.key(0), (5, 3), jnp.complex64)
    u, _, vh = np.linalg.svd(np.asarray(x), full_matrices=False)
    got = optim.orthogonalize(x, steps=30, coefficients=(2.0, -1.5, 0.5))
    np.testing.assert_allclose(got, u @ vh, atol=1e-5)


def test_parts_take_unevaluated_gradients(x64):
    """`fbprop.Rows` and `fbprop.Contraction` count as the arrays that they stand for."""
    params = {"t": jnp.ones((5, 3)), "w": jnp.ones((3, 2))}
    loss = lambda p: jnp.sum(jnp.sin(p["t"][jnp.array([1, 1, 4])] @ p["w"]) ** 2)
    factored, plain = (fbprop.grad(loss, factored=f)(params) for f in (True, False))
    assert not isinstance(factored["t"], jax.Array)
    parts = [
        optim.clip_by_global_norm(0.1), optim.clip_by_leaf_norm(0.1), optim.clip_by_leaf_rms(0.1),
        optim.clip_by_value(0.1), optim.scale(2.0), optim.scale_by_learning_rate(0.1),
        optim.add_weight_decay(0.1), optim.scale_by_trust_ratio(), optim.average_params(),
    ]

    @jax.jit
    def updates(grads):
        return [o.update(grads, o.init(params), params)[0] for o in parts], optim.global_norm(grads)

    chex.assert_trees_all_close(updates(factored), updates(plain), rtol=1e-12)
