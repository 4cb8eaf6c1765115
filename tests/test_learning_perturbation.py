"""Forward gradients and evolution strategies: their formulas, and that they are unbiased."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import learning
from fbprop.learning.perturbation import noise

DRAW = np.random.default_rng(0)
PARAMS = {"a": DRAW.normal(size=(3, 2)) / 2, "c": DRAW.normal(size=2),
          "z": DRAW.normal(size=(2, 1)), "h": DRAW.normal(size=(1, 1))}
X = DRAW.normal(size=(4, 3))
KEY = jax.random.key(0)
CHEAP = jax.random.key(0, impl="rbg")  # compiles in a third of the time


def loss(params, x):
    """A dense layer with a bias, and a loop."""
    y = jnp.tanh(x @ params["a"] + params["c"]) @ params["z"]
    y, _ = jax.lax.scan(lambda y, _: (jnp.sin(y @ params["h"]), None), y, None, length=2)
    return jnp.sum(y**2)


def dot(a, b):
    return sum(np.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def assert_close(a, b, **options):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), a, b)


def draws(samples):
    """The keys of a step's samples."""
    return jax.random.split(jax.random.split(CHEAP)[1], samples)


def test_a_forward_gradient_is_the_slope_along_noise(x64):
    method = learning.forward_gradient(samples=3)

    @jax.jit
    def run(params, x, key):
        found = method.value_and_grad(loss)(params, x, memory=key)
        noises = [noise(k, params) for k in draws(3)]
        return found, fbprop.value_and_grad(loss)(params, x), noises

    ((value, found), new), (plain, gradient), noises = run(PARAMS, X, CHEAP)
    total = jax.tree.map(np.zeros_like, PARAMS)
    for v in noises:
        slope = dot(gradient, v)
        total = jax.tree.map(lambda t, v: t + slope * v / 3, total, v)
    assert_close(found, total, rtol=1e-11)
    assert float(value) == float(plain)
    assert not np.array_equal(jax.random.key_data(new), jax.random.key_data(CHEAP))


@pytest.mark.parametrize("rank", [None, 2])
def test_an_evolution_strategy_is_differences_along_noise(x64, rank):
    method = learning.evolution_strategy(0.1, samples=2, rank=rank)

    @jax.jit
    def run(params, x, key):
        (_, found), _ = method.value_and_grad(loss)(params, x, memory=key)
        return found, [noise(k, params, rank) for k in draws(2)]

    found, noises = run(PARAMS, X, CHEAP)
    of, total = jax.jit(loss), jax.tree.map(np.zeros_like, PARAMS)
    for e in noises:
        up, down = (of(jax.tree.map(lambda p, e: p + s * e, PARAMS, e), X) for s in (0.1, -0.1))
        total = jax.tree.map(lambda t, e: t + (up - down) / 0.2 * e / 2, total, e)
    assert_close(found, total, rtol=1e-10)


def test_noise_of_low_rank_is_white(x64):
    of = jax.jit(jax.vmap(lambda key: noise(key, jnp.ones((2, 3)), 2)))
    e = of(jax.random.split(KEY, 20000))
    flat = e.reshape(len(e), -1)
    np.testing.assert_allclose(flat.T @ flat / len(e), np.eye(6), atol=0.06)


METHODS = {
    "forward": learning.forward_gradient(),
    "activity": learning.activity_forward_gradient(samples=2),
    "evolution": learning.evolution_strategy(1e-3, samples=1),
    "low rank": learning.evolution_strategy(1e-3, samples=1, rank=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_mean_direction_is_the_gradient(x64, name):
    """Over 20,000 keys, every element within 5 of its standard errors."""
    method = METHODS[name]
    run = lambda key: method.value_and_grad(loss)(PARAMS, X, memory=key)[0][1]
    both = jax.jit(lambda keys: (jax.vmap(run)(keys), fbprop.grad(loss)(PARAMS, X)))
    found, gradient = both(jax.random.split(jax.random.key(1), 20_000))
    for mean, spread, g in zip(*map(jax.tree.leaves, (
        jax.tree.map(functools.partial(np.mean, axis=0), found),
        jax.tree.map(functools.partial(np.std, axis=0), found), gradient,
    ))):
        error = spread / np.sqrt(20_000)
        assert np.all(np.abs(mean - g) < 5 * error + 1e-6)
        assert np.max(error) < 0.1 * np.sqrt(dot(gradient, gradient))


def test_noise_on_activities_has_less_variance_where_they_are_fewer(x64):
    def wide(params, x):
        return jnp.sum(jnp.sin(x @ params))

    params, x = DRAW.normal(size=(20, 3)), DRAW.normal(size=(1, 20))
    gradient = fbprop.grad(wide)(params, x)

    def error(method):
        run = lambda key: method.value_and_grad(wide)(params, x, memory=key)[0][1]
        found = jax.jit(jax.vmap(run))(jax.random.split(KEY, 2000))
        return np.mean(np.sum((found - gradient) ** 2, (1, 2)))

    few, many = error(METHODS["activity"]), error(learning.forward_gradient(samples=2))
    assert few < many / 5


def test_auxiliary_results_and_errors():
    params, x = jax.tree.map(lambda a: jnp.asarray(a, "float32"), (PARAMS, X))
    aux = lambda params, x: (loss(params, x), {"n": jnp.float32(len(x))})
    run = jax.jit(lambda: [
        m.value_and_grad(aux, has_aux=True)(params, x, memory=m.init(KEY, aux, params, x))
        for m in METHODS.values()
    ])
    for ((_, found), _), _ in run():
        assert float(found["n"]) == 4
    for method in METHODS.values():
        with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
            method.value_and_grad(lambda n: n)(3, memory=KEY)
    for make in (learning.forward_gradient, learning.activity_forward_gradient,
                 learning.evolution_strategy):
        with pytest.raises(ValueError, match="one sample or more, got samples=0"):
            make(samples=0)
    with pytest.raises(ValueError, match="got sigma=0, rank=None expected"):
        learning.evolution_strategy(0)
    with pytest.raises(ValueError, match="got sigma=0.01, rank=0 expected"):
        learning.evolution_strategy(rank=0)


def test_noise_of_each_examples_own_has_less_variance(x64):
    """Its mean over keys is the gradient; of 16 examples the variance is an eighth or less."""
    x = DRAW.normal(size=(16, 3))

    def mean_loss(params, batch, key):
        y = jnp.tanh(batch["x"] @ params["a"] + params["c"]) @ params["z"]
        y, _ = jax.lax.scan(lambda y, _: (jnp.sin(y @ params["h"]), None), y, None, length=2)
        return jnp.mean(y**2)

    def both(key):
        methods = [learning.activity_forward_gradient(per_example=w) for w in (None, 0)]
        runs = [m.value_and_grad(mean_loss) for m in methods]
        return [run(PARAMS, {"x": x}, KEY, memory=key)[0] for run in runs]

    value, gradient = jax.jit(fbprop.value_and_grad(mean_loss))(PARAMS, {"x": x}, KEY)
    errors = []
    for values, found in jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(2), 4000)):
        np.testing.assert_allclose(values, value)
        spread = jax.tree.map(lambda d: np.std(d, 0), found)
        jax.tree.map(lambda d, g, s: np.testing.assert_array_less(
            np.abs(np.mean(d, 0) - g), 5 * s / np.sqrt(4000)), found, gradient, spread)
        errors.append(dot(spread, spread))
    assert errors[1] < errors[0] / 8

    method = learning.activity_forward_gradient(per_example=0)
    with pytest.raises(ValueError, match="leave per_example out"):
        method.value_and_grad(lambda p, x: jnp.mean((p["a"].T @ x.T) ** 2))(PARAMS, x, memory=KEY)
