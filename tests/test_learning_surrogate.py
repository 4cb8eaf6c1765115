"""Surrogates for what has no derivative, by path and under transformations; spiking neurons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import learning, nn

X = np.array([-2.3, -0.45, -0.1, 0.0, 0.2, 0.55, 1.9])
SHAPES = {
    ("fast_sigmoid", 2.0): lambda d: 1 / (1 + 2 * np.abs(d)) ** 2,
    ("arctan", 3.0): lambda d: 1.5 / (1 + (np.pi * 3 * d / 2) ** 2),
    ("triangle", 0.5): lambda d: np.maximum(1 - np.abs(d) / 2, 0),
    ("clipped", 4.0): lambda d: 1.0 * (4 * np.abs(d) <= 1),
    ("straight_through", 1.0): np.ones_like,
}
FUNCTIONS = {
    "step": (lambda x: jnp.heaviside(x, 0.0 * x[0]), X, lambda d: 1.0 * (d > 0)),
    "sign": (jnp.sign, X, np.sign),
    "round": (jnp.round, X - np.floor(X) - 0.5, lambda d: np.round(X)),
    "floor": (jnp.floor, X - np.round(X), lambda d: np.floor(X)),
    "ceil": (jnp.ceil, X - np.round(X), lambda d: np.ceil(X)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_surrogate_takes_the_derivatives_place_by_path(x64, name):
    function, distance, value = FUNCTIONS[name]

    def network(x):
        with jax.named_scope("spikes"):
            y = function(x)
        return y * jnp.arange(1.0, 8.0), function(x)

    @jax.jit
    def all_of_them(x):
        found = {}
        for shape, slope in SHAPES:
            rules = fbprop.table.override(
                learning.surrogate(name, shape, slope), where="spikes/*"
            )
            out, pullback = fbprop.vjp(network, x, rules=rules)
            found[shape, slope] = out[0], *pullback((jnp.ones(7), jnp.ones(7)))
        return {repr(k): v for k, v in found.items()}

    found = all_of_them(X)
    for (shape, slope), h in SHAPES.items():
        y, dx = found[repr((shape, slope))]
        np.testing.assert_array_equal(y, value(distance) * np.arange(1, 8))
        height = 2 if name == "sign" and shape in ("fast_sigmoid", "arctan", "triangle") else 1
        np.testing.assert_allclose(dx, height * h(distance) * np.arange(1, 8), 1e-12)


def test_the_largest_of_several_learns_as_softmax(x64):
    x, dy = X.reshape(7, 1) * np.array([1.0, -1.0, 0.5]), np.arange(21.0).reshape(7, 3)
    rules = fbprop.table.override(learning.surrogate("argmax", slope=2.0))

    @jax.jit
    def each(x):
        def one(axis):
            of = lambda x: jnp.sum(learning.one_hot_argmax(x, axis=axis) * dy)
            expected = jax.jit(jax.grad(lambda x: jnp.sum(jax.nn.softmax(2 * x, axis) * dy)))(x)
            found = learning.one_hot_argmax(x, axis=axis)
            return fbprop.grad(of, rules=rules)(x), expected, fbprop.grad(of)(x), found

        return [one(axis) for axis in (-1, 0)]

    for axis, (dx, expected, none, found) in zip((-1, 0), each(x)):
        np.testing.assert_allclose(dx, expected, 1e-10)
        assert not np.any(none)
        best = np.argmax(x, axis)
        np.testing.assert_array_equal(np.argmax(found, axis), best)
        assert np.sum(found) == best.size


def test_a_step_with_its_surrogate_built_in(x64):
    def of(shape, slope):
        return lambda x: jnp.sum(learning.step(x, shape, slope) * jnp.arange(1.0, 8.0))

    run = jax.jit(lambda x: [[g(of(*s))(x) for g in (fbprop.grad, jax.grad)] for s in SHAPES])
    for h, both in zip(SHAPES.values(), run(X)):
        for found in both:
            np.testing.assert_allclose(found, h(X) * np.arange(1, 8), 1e-12)


def numpy_spikes(w, x, y, decay, threshold, slope, zero, steps):
    """Spikes, and w̄ of Σ (spikes − y)² by hand, through time; the reset is a constant."""
    drive, b = x @ w, x.shape[0]
    v, kept, spikes = np.zeros((b, w.shape[1])), [], []
    for t in range(x.shape[1]):
        v = decay * v + drive[:, t]
        s = 1.0 * (v > threshold)
        kept.append((v - threshold, s))
        spikes.append(np.where(steps[:, t, None], s, 0))
        v = v * (1 - s) if zero else v - threshold * s
    dw, dv = np.zeros_like(w), np.zeros_like(v)
    for t in reversed(range(x.shape[1])):
        over, s = kept[t]
        ds = np.where(steps[:, t, None], 2 * (spikes[t] - y[:, t]), 0)
        dv = ds / (1 + slope * np.abs(over)) ** 2 + dv * ((1 - s) if zero else 1)
        dw += x[:, t].T @ dv
        dv = decay * dv
    return np.stack(spikes, 1), dw


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_leaky_integrate_and_fire_neurons(x64, reset):
    draw = np.random.default_rng(0)
    x, w, y = draw.normal(size=(3, 9, 2)), draw.normal(size=(2, 4)), draw.random((3, 9, 4))
    layer = nn.leaky_integrate_and_fire(decay=0.8, threshold=0.5, reset=reset, slope=3.0)
    plain = nn.leaky_integrate_and_fire(decay=0.8, threshold=0.5, reset=reset, surrogate=None)
    rules = fbprop.table.override(
        learning.surrogate("step", slope=3.0), where="leaky_integrate_and_fire/*"
    )
    every = np.ones((3, 9), bool)
    spikes, dw = numpy_spikes(w, x, y, 0.8, 0.5, 3.0, reset == "zero", every)

    def loss(layer):
        return lambda w: jnp.sum((layer.apply({}, x @ w) - y) ** 2)

    @jax.jit
    def all_of_them(w):
        same = (fbprop.grad(loss(layer))(w), jax.grad(loss(layer))(w),
                fbprop.grad(loss(plain), rules=rules)(w))
        padded = layer.apply({}, x @ w, lengths=jnp.array([9, 4, 0]))
        return layer.apply({}, x @ w), same, fbprop.grad(loss(plain))(w), padded

    out, same, none, padded = all_of_them(w)
    np.testing.assert_array_equal(out, spikes)
    assert 0 < np.mean(spikes) < 1
    for found in same:
        np.testing.assert_allclose(found, dw, 1e-11, 1e-12)
    assert not np.any(none)
    np.testing.assert_array_equal(padded, spikes * (np.arange(9) < [[9], [4], [0]])[..., None])


def test_errors():
    with pytest.raises(ValueError, match="function that jumps, got 'tanh' expected one of"):
        learning.surrogate("tanh")
    with pytest.raises(ValueError, match="A surrogate has a shape, got 'box'"):
        learning.step(1.0, "box")
    with pytest.raises(ValueError, match="slope is positive, got slope=0: 25.0 is usual"):
        learning.surrogate("sign", slope=0)
    for wrong in ({"reset": "none"}, {"decay": 2}):
        with pytest.raises(ValueError, match="decays by a share and resets by"):
            nn.leaky_integrate_and_fire(**wrong)
