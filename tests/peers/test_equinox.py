"""Equinox models, and Optax around both gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fbprop
from compare import assert_same_gradient, cast

KEY = jax.random.key(0)
both = pytest.mark.parametrize("dtype", ["float64", "float32"])


class Recurrent(eqx.Module):
    cell: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, cell, key):
        self.cell, self.head = cell(3, 5, key=key), eqx.nn.Linear(5, 2, key=key)

    def __call__(self, xs):
        hidden = jnp.zeros(5, xs.dtype)
        start = (hidden, hidden) if isinstance(self.cell, eqx.nn.LSTMCell) else hidden
        step = lambda state, x: (self.cell(x, state), None)
        state = jax.lax.scan(step, start, xs)[0]
        return self.head(state[0] if isinstance(state, tuple) else state)


MODELS = {
    "mlp": (lambda: eqx.nn.MLP(3, 2, 7, 2, key=KEY), (4, 3)),
    "convnet": (lambda: eqx.nn.Sequential([
        eqx.nn.Conv2d(2, 3, 3, key=KEY), eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Lambda(jnp.ravel), eqx.nn.LayerNorm(12), eqx.nn.Linear(12, 2, key=KEY),
    ]), (3, 2, 6, 6)),
    "lstm": (lambda: Recurrent(eqx.nn.LSTMCell, KEY), (2, 5, 3)),
    "gru": (lambda: Recurrent(eqx.nn.GRUCell, KEY), (2, 5, 3)),
}


class Attending(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __call__(self, x):
        x = x + eqx.filter_checkpoint(self.attention)(x, x, x)
        return x + eqx.nn.Dropout(0.2)(jax.vmap(self.mlp)(x), key=KEY)


MODELS["attention, checkpoint, dropout"] = (
    lambda: Attending(eqx.nn.MultiheadAttention(2, 4, key=KEY), eqx.nn.MLP(4, 4, 6, 1, key=KEY)),
    (2, 5, 4),
)


def test_equinox_batch_norm_under_vmap():
    with jax.enable_x64(True):
        model, state = eqx.nn.make_with_state(lambda: eqx.nn.Sequential([
            eqx.nn.Linear(3, 4, key=KEY), eqx.nn.BatchNorm(4, "batch", mode="batch"),
            eqx.nn.Lambda(jnp.tanh), eqx.nn.SpectralNorm(
                eqx.nn.Linear(4, 2, key=KEY), weight_name="weight", key=KEY
            ),
        ]))()
        params, static = eqx.partition(cast(model, "float64"), eqx.is_inexact_array)
        x = jax.random.normal(KEY, (6, 3))
        run = lambda p: jax.vmap(
            eqx.combine(p, static), in_axes=(0, None), out_axes=(0, None), axis_name="batch"
        )(x, cast(state, "float64"))[0]
        assert_same_gradient(lambda p: jnp.mean(run(p) ** 2), params, "float64")


@both
@pytest.mark.parametrize("name", MODELS)
def test_equinox(name, dtype):
    make, shape = MODELS[name]
    with jax.enable_x64(True):
        params, static = eqx.partition(cast(make(), dtype), eqx.is_inexact_array)
        x = cast(jax.random.normal(KEY, shape), dtype)
        loss = lambda p: jnp.mean(jax.vmap(eqx.combine(p, static))(x) ** 2)
        assert_same_gradient(loss, params, dtype)


def test_optax_loop_with_our_gradients():
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    x = jax.random.normal(KEY, (5, 3))
    loss = lambda p: jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) - 0.3) ** 2)

    def train(value_and_grad, optimizer, apply):
        p, state, losses = params, optimizer.init(params), []
        for _ in range(10):
            value, gradient = jax.jit(value_and_grad(loss))(p)
            updates, state = optimizer.update(gradient, state, p)
            p = apply(p, updates)
            losses.append(float(value))
        return losses

    expected = train(jax.value_and_grad, optax.adam(0.1), optax.apply_updates)
    assert expected[-1] < expected[0]
    ours = train(fbprop.value_and_grad, optax.adam(0.1), optax.apply_updates)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    ours = train(fbprop.value_and_grad, fbprop.optim.adam(0.1), fbprop.optim.apply_updates)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_our_optimiser_in_an_optax_chain():
    params = {"w": jnp.ones((3, 2))}
    gradient = {"w": jnp.full((3, 2), 5.0)}
    chain = optax.chain(optax.clip_by_global_norm(1.0), fbprop.optim.sgd(0.1, momentum=0.9))
    same = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    ours, theirs = chain.init(params), same.init(params)
    for _ in range(3):
        a, ours = chain.update(gradient, ours, params)
        b, theirs = same.update(gradient, theirs, params)
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-6)
