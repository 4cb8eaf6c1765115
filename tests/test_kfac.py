"""K-FAC: the formula in NumPy, its arguments, and what it buys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim, train
from fbprop.watch import curvature

PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.1], [0.3, 0.7]]), "b": jnp.array([0.1, -0.2])}
X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
Y = jnp.asarray(np.random.default_rng(1).standard_normal((5, 2)))


def network(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def squared(outputs, y):
    return jnp.mean((outputs - y) ** 2)


FACTORS = jax.jit(
    curvature.ggn(network, squared, "kronecker", root=curvature.squared_root))


def test_is_the_formula():
    """10 steps in NumPy: damping shared by traces, running averages, inverses every 3 steps."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
        x, y = X.astype(jnp.float64), Y.astype(jnp.float64)
        options = {"damping": 0.1, "decay": 0.5, "every": 3, "momentum": 0.6, "clip": 0.2}
        optimizer = optim.kfac(0.3, FACTORS(params, x, y), **options)
        gradient = jax.grad(lambda p: squared(network(p, x), y))

        @jax.jit
        def step(params, state):
            g, factors = gradient(params), FACTORS(params, x, y)
            updates, state = optimizer.update(g, state, params, factors=factors)
            return optim.apply_updates(params, updates), state, g, factors

        state, reference = optimizer.init(params), _Reference(FACTORS(params, x, y), options)
        for _ in range(10):
            before = params
            params, state, g, factors = step(params, state)
            expected = reference.step(before, g, factors)
            for name in params:
                np.testing.assert_allclose(params[name], expected[name], rtol=1e-10)


class _Reference:
    def __init__(self, factors, options):
        self.__dict__.update(options)
        self.average, self.count = self._arrays(factors), 0
        self.moved = {"w": np.zeros((3, 2)), "b": np.zeros(2)}

    def _arrays(self, f):
        return [np.asarray(v) for v in (f["w"].a, f["w"].g, f["b"].matrix)]

    def step(self, params, g, factors):
        new = self._arrays(factors)
        self.average = [self.decay * a + (1 - self.decay) * f for a, f in zip(self.average, new)]
        if self.count % self.every == 0:
            a, k, b = self.average
            ratio = np.sqrt(np.trace(a) / 3 / (np.trace(k) / 2))
            root = self.damping**0.5
            self.inverses = [
                np.linalg.inv(a + ratio * root * np.eye(3)),
                np.linalg.inv(k + root / ratio * np.eye(2)),
                np.linalg.inv(b + self.damping * np.eye(2)),
            ]
        self.count += 1
        a, k, b = self.inverses
        u = {"w": a @ np.asarray(g["w"]) @ k, "b": b @ np.asarray(g["b"])}
        length = np.sqrt(sum(np.sum(u[n] * np.asarray(g[n])) for n in u))
        scale = min(1, self.clip / length)
        self.moved = {n: self.momentum * self.moved[n] + scale * u[n] for n in u}
        return {n: np.asarray(params[n]) - 0.3 * self.moved[n] for n in u}


def test_trains_and_resumes_with_the_same_bits(tmp_path):
    """The curvature of every step's batch; as by hand, and as if never stopped."""
    def of_batch(params, batch, key):
        factors = curvature.ggn(network, squared, "kronecker", samples=1)
        return factors(params, batch["x"], batch["y"], key=key)

    loss = lambda params, batch, key: squared(network(params, batch["x"]), batch["y"])
    batch = {"x": X, "y": Y}
    first = jax.jit(of_batch)(PARAMS, batch, jax.random.key(5))
    optimizer = optim.kfac(0.1, first, curvature=of_batch, every=2, damping=0.1)
    state, step = train.init(PARAMS, optimizer), train.step(loss, optimizer)

    @jax.jit
    def by_hand(params, key):
        gradient, now = jax.grad(loss)(params, batch, key), of_batch(params, batch, key)
        return optimizer.update(gradient, optimizer.init(params), params, factors=now)[0]

    updates = by_hand(PARAMS, jax.random.fold_in(state.key, 0))
    state, _ = step(state, batch)
    for name in PARAMS:
        np.testing.assert_allclose(state.params[name], PARAMS[name] + updates[name], rtol=1e-5)
    train.save(tmp_path / "saved", state)
    again = train.restore(tmp_path / "saved", train.init(PARAMS, optimizer))
    for _ in range(2):
        (state, _), (again, _) = step(state, batch), step(again, batch)
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(again.opt_state)):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="of a step's batch, got an update without one"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_in_epochs_and_fit_and_of_frozen_parameters():
    """Steps of an epoch and of `fit` are those of `train.step`; what is frozen has no curvature."""
    def of_batch(params, batch, key):
        return FACTORS(params, batch["x"], batch["y"])

    def loss(params, batch, key):
        return squared(network(params, batch["x"]), batch["y"])

    def begin(optimizer):
        return train.init(jax.tree.map(jnp.copy, PARAMS), optimizer)

    batch = {"x": X, "y": Y}
    first = FACTORS(PARAMS, X, Y)
    optimizer = optim.kfac(0.1, first, curvature=of_batch, every=1, damping=0.1, clip=None)
    state, step = begin(optimizer), train.step(loss, optimizer)
    for _ in range(2):
        state, _ = step(state, batch)
    indices = jnp.tile(jnp.arange(5), (2, 1))
    epoch, _ = train.epoch(loss, optimizer)(begin(optimizer), batch, indices)
    fitted = train.fit(loss, optimizer, PARAMS, batch, epochs=2, batch_size=5, progress=False).state
    for other in (epoch, fitted):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
                     (state.params, state.opt_state), (other.params, other.opt_state))
    frozen = optim.freeze(optimizer, "b")
    before = begin(frozen)
    after, _ = train.step(loss, frozen)(begin(frozen), batch)
    assert len(jax.tree.leaves(before.opt_state[0].factors)) == 2  # w's A and G
    np.testing.assert_array_equal(after.params["b"], PARAMS["b"])
    gradient = jax.jit(jax.grad(loss))(PARAMS, batch, None)["w"]
    expected = PARAMS["w"] - 0.1 * first["w"].inverse(0.1).times(gradient)
    np.testing.assert_allclose(after.params["w"], expected, rtol=1e-5)


def test_without_new_factors_the_average_stays():
    optimizer = optim.kfac(0.1, FACTORS(PARAMS, X, Y))
    state = optimizer.init(PARAMS)
    _, after = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    for a, b in zip(jax.tree.leaves(state[0].factors), jax.tree.leaves(after[0].factors)):
        np.testing.assert_array_equal(a, b)


def test_one_undamped_step_solves_least_squares():
    """Where the curvature is one Kronecker product, K-FAC is Newton's method."""
    w, y = jnp.zeros((3, 1)), Y[:, :1]
    linear = lambda w, x: x @ w
    factors = jax.jit(curvature.ggn(linear, squared, "kronecker"))(w, X, y)
    optimizer = optim.kfac(1.0, factors, damping=0.0, clip=None)
    gradient = jax.jit(jax.grad(lambda w: squared(linear(w, X), y)))(w)
    updates, _ = optimizer.update(gradient, optimizer.init(w), w)
    np.testing.assert_allclose(updates, np.linalg.lstsq(X, y)[0], rtol=1e-4)


@pytest.mark.parametrize(("options", "what"), [
    ({"damping": -1}, "damping=-1 expected"), ({"decay": 1.0}, "decay of a running average"),
    ({"momentum": 1.0}, "momentum is the decay"), ({"every": 0}, "every is a count"),
    ({"clip": -1}, "clip=-1 expected"),
])
def test_values_out_of_range(options, what):
    with pytest.raises(ValueError, match=what):
        optim.kfac(0.1, None, **options)


def test_factors_that_are_none():
    optimizer = optim.kfac(0.1, PARAMS)
    with pytest.raises(TypeError, match="K-FAC starts from a curvature like the parameters"):
        optimizer.init(PARAMS)
