"""Flax models, linen and nnx: the gradient of the user's model, unchanged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from compare import assert_same_gradient, cast

KEY = jax.random.key(0)
both = pytest.mark.parametrize("dtype", ["float64", "float32"])


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.BatchNorm(use_running_average=False)(nn.Conv(3, (3, 3), use_bias=False)(x))
        y = nn.Conv(3, (3, 3))(nn.relu(y))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(Residual()(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(5)(jnp.mean(Residual()(x), (1, 2)))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(5)(x)


class Recurrent(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        return nn.RNN(self.cell(7, param_dtype=x.dtype))(x)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.Dropout(0.3, deterministic=False)(nn.tanh(nn.Dense(7)(x))))


class PerExample(nn.Module):
    """Batch norm of examples that it is mapped over."""

    @nn.compact
    def __call__(self, x):
        block = lambda module, x: nn.BatchNorm(False, axis_name="batch")(
            nn.Dense(4, use_bias=False)(x)
        )
        return nn.vmap(
            block, variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False}, axis_name="batch",
        )(self, x)


class Stacked(nn.Module):
    """One layer's parameters stacked, scanned over, and computed again in the backward pass."""

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(lambda module, c, _: (nn.tanh(nn.Dense(3)(c)), None))
        return nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )(self, x, None)[0]


LINEN = {
    "batch norm under vmap": (PerExample(), (6, 3)),
    "scan of remat": (Stacked(), (2, 3)),
    "mlp with dropout": (MLP(), (3, 5)),
    "resnet": (ResNet(), (2, 6, 6, 3)),
    "encoder": (Encoder(), (2, 5)),
    "lstm": (Recurrent(nn.LSTMCell), (2, 5, 3)),
    "gru": (Recurrent(nn.GRUCell), (2, 5, 3)),
}


@both
@pytest.mark.parametrize("name", LINEN)
def test_linen(name, dtype):
    model, shape = LINEN[name]
    with jax.enable_x64(True):
        tokens = jax.random.randint(KEY, shape, 0, 11)
        x = tokens if name == "encoder" else cast(jax.random.normal(KEY, shape), dtype)
        variables = cast(model.init({"params": KEY, "dropout": KEY}, x), dtype)
        state = {k: v for k, v in variables.items() if k != "params"}

        def loss(params):
            y, _ = model.apply(
                {"params": params, **state}, x, rngs={"dropout": KEY}, mutable=["batch_stats"]
            )
            return jnp.mean(y**2) + jnp.sum(jnp.sin(y))

        assert_same_gradient(loss, variables["params"], dtype)


class Network(nnx.Module):
    def __init__(self, rngs, dtype):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs, param_dtype=dtype, dtype=dtype)
        self.norm = nnx.BatchNorm(4, rngs=rngs, param_dtype=dtype, dtype=dtype)
        self.out = nnx.Linear(4, 2, rngs=rngs, param_dtype=dtype, dtype=dtype)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.out(jnp.mean(x, (1, 2)))


@both
def test_nnx(dtype):
    with jax.enable_x64(True):
        graph, params, rest = nnx.split(Network(nnx.Rngs(0), jnp.dtype(dtype)), nnx.Param, ...)
        params, rest = cast((params, rest), dtype)
        x = cast(jax.random.normal(KEY, (2, 6, 6, 3)), dtype)
        loss = lambda p: jnp.mean(nnx.merge(graph, p, rest, copy=True)(x) ** 2)
        assert_same_gradient(loss, params, dtype)
