"""Learning rules on other packages' models: every weight is found, and none is taken for another.

With a weight's own transpose as feedback the direction is the gradient; with random feedback it is
another, for all but the last layer.
"""

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_equinox import MODELS
from test_flax import Encoder, Recurrent, ResNet

import fbprop
from fbprop import learning

KEY = jax.random.key(0)
OWN = learning.Feedback(lambda key, w: (), lambda state, w: (w, state))


def compared(apply, params, x):
    """Paths of the weights that have feedback, and how far directions are from the gradient."""
    def loss(params, x):
        return jnp.mean(jnp.square(apply(params, x)))

    random = learning.feedback_alignment()
    memory = random.init(KEY, loss, params, x)

    @jax.jit
    def directions(params, x):
        own = OWN.value_and_grad(loss)(params, x, memory=dict.fromkeys(memory, ()))[0][1]
        return own, fbprop.grad(loss)(params, x)

    own, gradient = directions(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), own, gradient)
    assert learning.alignment(random, loss)(params, x, memory=memory).total < 0.99
    return set(memory)


def test_flax():
    images, tokens = jnp.ones((2, 8, 8, 1)) * jnp.arange(8.0)[:, None], jnp.arange(6).reshape(2, 3)
    net = ResNet()
    params = net.init(KEY, images)
    stats = {"batch_stats": params["batch_stats"]}
    found = compared(
        lambda p, x: net.apply({"params": p, **stats}, x, mutable=["batch_stats"])[0],
        params["params"], images,
    )
    assert found == {f"Residual_{i}/Conv_{j}/kernel" for i in (0, 1) for j in (0, 1)} | {
        "Dense_0/kernel"}
    net = Encoder()
    params = net.init(KEY, tokens)["params"]
    found = compared(lambda p, x: net.apply({"params": p}, x), params, tokens)
    heads = {f"MultiHeadDotProductAttention_{i}/{name}/kernel" for i in (0, 1)
             for name in ("query", "key", "value", "out")}
    assert found == heads | {f"Dense_{i}/kernel" for i in range(5)}
    net = Recurrent(linen.OptimizedLSTMCell)
    x = jnp.ones((2, 5, 3))
    params = net.init(KEY, x)["params"]
    found = compared(lambda p, x: net.apply({"params": p}, x), params, x)
    assert len(found) == 4  # the recurrent kernels of four gates, side by side
    assert all("/h" in path for path in found)


@pytest.mark.parametrize(("name", "weights"), [("mlp", 2), ("convnet", 1), ("lstm", 2), ("gru", 2)])
def test_equinox(name, weights):
    make, shape = MODELS[name]
    params, static = eqx.partition(make(), eqx.is_inexact_array)
    x = jax.random.normal(KEY, shape)
    apply = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    assert len(compared(apply, params, x)) == weights


def test_haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([7, 5, 2])(x)))
    x = jax.random.normal(KEY, (4, 3))
    found = compared(net.apply, net.init(KEY, x), x)
    assert found == {"mlp/~/linear_1/w", "mlp/~/linear_2/w"}
