"""Shardings as part of types (mesh axes of type Explicit): gradients get their operands'."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fbprop


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def product_of_sharded_dimensions(x, w, v):
    h = jnp.tanh(x @ w)
    return jnp.einsum("bh,ho->bo", h, v, out_sharding=P("data", None))


def gram(x, w, v):
    return jnp.einsum("bi,ci->bc", x, x, out_sharding=P("data", None))


def loop(x, w, v):
    return lax.scan(lambda c, _: (jnp.sin(c) * jnp.mean(w), None), x, None, length=3)[0]


def branch(x, w, v):
    return lax.cond(jnp.sum(x) > -99.0, jnp.square, lambda x: x, x)


def rematerialised(x, w, v):
    return jax.checkpoint(lambda w: jnp.sin(jnp.sin(x @ w)))(w)


def rows(x, w, v):
    return x.at[:, jnp.array([0, 2])].get(out_sharding=P("data", None))


def tied(x, w, v):
    """A table that is read by rows, under another mesh than everything else, and in a product."""
    looked_up = w.at[jnp.array([3, 0, 0, 1])].get(out_sharding=P(None, "model"))
    return x[:4] @ (looked_up + w)


def pieces(x, w, v):
    left, right = jnp.split(x, 2, axis=1)
    return left * right + x[:, 1:3] * x[:, :1]


def image(x, w, v):
    kernel = jnp.reshape(jnp.sum(w, axis=1, keepdims=True), (4, 1, 1))
    return lax.conv_general_dilated(x[..., None], kernel, (1,), "SAME",
                                    dimension_numbers=("NWC", "WIO", "NWC"))


@pytest.mark.parametrize("fun", [
    product_of_sharded_dimensions, gram, loop, branch, rematerialised, rows, tied, pieces, image,
    lambda x, w, v: jax.vmap(lambda row: jnp.tanh(row @ w))(x),
    lambda x, w, v: jax.nn.log_softmax(x)[:, :2],
    lambda x, w, v: jax.reshard(x, P(None, "model")),
    lambda x, w, v: jnp.cumsum(x, 1) * jnp.where(x > 0.4, x, 0.0) + jnp.max(x, 1, keepdims=True),
], ids=["product", "gram", "loop", "branch", "remat", "rows", "tied", "pieces", "image", "vmap",
        "log_softmax", "reshard", "cumsum"])
def test_gradients_have_the_shardings_of_what_they_are_of(fun, mesh):
    def loss(x, w, v):
        return jnp.sum(jnp.sin(fun(x, w, v)))

    shapes = {"x": ((8, 4), P("data", None)), "w": ((4, 6), P(None, "model")),
              "v": ((6, 3), P("model", None))}
    arrays = [
        jax.device_put(jax.random.normal(jax.random.key(i), shape), NamedSharding(mesh, spec))
        for i, (shape, spec) in enumerate(shapes.values())
    ]
    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    got = jax.jit(fbprop.grad(loss, (0, 1, 2)))(*arrays)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    assert [*map(jax.typeof, got)] == [*map(jax.typeof, expected)]
