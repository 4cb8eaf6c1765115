"""Haiku models: what its documentation shows first."""

import haiku as hk
import jax
import jax.numpy as jnp
import pytest

from compare import assert_same_gradient, cast

KEY = jax.random.key(0)


def classifier(x):
    return hk.Sequential([hk.Flatten(), hk.nets.MLP([9, 7]), jax.nn.relu, hk.Linear(4)])(x)


def unrolled(x):
    core = hk.DeepRNN([hk.LSTM(6), jax.nn.relu, hk.GRU(5)])
    outs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
    return hk.BatchApply(hk.Linear(3))(outs)


def convolutional(x):
    x = hk.Conv2D(4, 3)(x)
    x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
    x = hk.MaxPool((2, 2, 1), (2, 2, 1), "SAME")(jax.nn.relu(x))
    x = hk.dropout(hk.next_rng_key(), 0.3, hk.DepthwiseConv2D(1, 3)(x))
    return hk.Linear(3)(jnp.mean(x, (1, 2)))


def transformer(x):
    h = hk.LayerNorm(-1, True, True)(x)
    h = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling(1.0))(h, h, h)
    return x + hk.nets.MLP([8, x.shape[-1]], activation=jax.nn.gelu)(x + h)


MODELS = {
    "classifier": (classifier, (5, 3, 3, 1)), "recurrent": (unrolled, (4, 2, 3)),
    "batch norm and dropout": (convolutional, (3, 6, 6, 2)),
    "transformer": (transformer, (2, 5, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_haiku(name):
    network, shape = MODELS[name]
    model = hk.transform_with_state(network)
    with jax.enable_x64(True):
        x = jax.random.normal(KEY, shape)
        params, state = cast(model.init(KEY, x), "float64")
        loss = lambda p: jnp.mean(model.apply(p, state, KEY, x)[0] ** 2)
        assert_same_gradient(loss, params, "float64")
