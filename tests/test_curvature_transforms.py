"""Curvature and moments inside `vmap` and `scan`, and of a batch that eight devices share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fbprop.watch import curvature, per_example

pytestmark = pytest.mark.usefixtures("x64")
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def network(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def squared(outputs, y):
    return jnp.mean((outputs - y) ** 2)


def loss(p, x, y):
    return squared(network(p, x), y)


def everything(p, x, y):
    direction, key = jax.tree.map(jnp.ones_like, p), jax.random.key(0)
    of_hessian = lambda v: curvature.hessian_vector(loss)(p, v, x, y)
    return {
        "fisher": curvature.fisher(loss)(p, x, y),
        "blocks": curvature.ggn(network, squared, "blocks")(p, x, y),
        "kronecker": curvature.ggn(network, squared, "kronecker", samples=2)(p, x, y, key=key),
        "hessian": of_hessian(direction),
        "ggn": curvature.ggn_vector(network, squared)(p, direction, x, y),
        "top": curvature.top_eigenvalue(of_hessian, p, key, steps=2),
        "moments": per_example.moments(loss)(p, x, y)[:4],
        "cosines": per_example.cosines(loss)(p, x, y),
    }


def close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, expected)


def problem():
    params = {"w": normal(0, 3, 2), "b": normal(1, 2)}
    return params, normal(2, 8, 3), normal(3, 8, 2)


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        return jax.jit(everything)(*problem())


def test_under_vmap_and_scan(expected):
    params, x, y = problem()
    several = jax.tree.map(lambda p: jnp.stack([2 * p, p]), params)

    @jax.jit
    def both(several):
        def step(carry, p):
            return carry, everything(p, x, y)

        return jax.vmap(lambda p: everything(p, x, y))(several), lax.scan(step, None, several)[1]

    mapped, looped = both(several)
    close(mapped, looped)
    close(jax.tree.map(lambda a: a[1], mapped), expected)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_of_a_batch_on_eight_devices(expected, kind):
    params, *batch = problem()
    kind = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, NamedSharding(mesh, P("d")))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        close(jax.jit(everything)(params, *batch), expected)
