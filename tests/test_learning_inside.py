"""Feedback through products that stand in a shard_map or have a derivative of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from fbprop import learning

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(8, 3))
FED = learning.feedback_alignment()


def weights(**shapes):
    return {name: DRAW.normal(size=shape) / 2 for name, shape in shapes.items()}


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), a, b)


PARAMS = weights(a=(3, 4), u=(4, 4), b=(4, 6), c=(6, 3), z=(3, 2))


def whole(p, x):
    h = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["u"])
    return jnp.sum(jnp.sin(jnp.tanh(jnp.tanh(h @ p["b"]) @ p["c"]) @ p["z"]))


def shared_out(checked):
    """The same on 2 x 2 devices: "u" is gathered, "b" and "c" are split as columns and rows."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:4],
    )

    def on_device(x, a, u, b, c):
        h = jnp.tanh(jnp.tanh(x @ a) @ lax.all_gather(u, "data", axis=0, tiled=True))
        return lax.psum(jnp.tanh(h @ b) @ c, "model")

    run = jax.shard_map(
        on_device, mesh=mesh, out_specs=P("data"), check_vma=checked,
        in_specs=(P("data"), P(), P("data"), P(None, "model"), P("model")),
    )

    def loss(p, x):
        h = run(x, *(p[name] for name in "aubc"))
        return jnp.sum(jnp.sin(jnp.tanh(h) @ p["z"]))

    return loss


def test_a_devices_part_of_a_weight_has_that_of_its_feedback(x64):
    memory = FED.init(jax.random.key(0), whole, PARAMS, X)
    losses = whole, shared_out(True), shared_out(False)

    @jax.jit
    def found(params, x, memory):
        return [FED.value_and_grad(loss)(params, x, memory=memory)[0] for loss in losses]

    one, *others = found(PARAMS, X, memory)
    for other in others:
        assert_close(other, one)
    assert_close(FED.init(jax.random.key(0), losses[1], PARAMS, X), memory)


@jax.custom_vjp
def careful(x, w):
    return 2 * jnp.einsum("bi,ij->bj", x, w)


careful.defvjp(
    lambda x, w: (careful(x, w), (x, w)),
    lambda kept, dy: (jnp.clip(2 * dy @ kept[1].T, -0.1, 0.1), 2 * kept[0].T @ dy),
)


@jax.custom_jvp
def steep(w, x):
    return (w @ x.T).T


@steep.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return steep(w, x), 3 * (w @ dx.T).T + (dw @ x.T).T


def of_its_own(p, x):
    h = jnp.tanh(careful(jnp.tanh(x @ p["a"]), p["b"]))
    return jnp.sum(jnp.sin(steep(p["z"].T, h)))


OWN = weights(a=(3, 4), b=(4, 6), z=(6, 2))


def test_a_product_with_its_own_derivative_has_it_at_the_feedback_weight(x64):
    memory = FED.init(jax.random.key(0), of_its_own, OWN, X)
    run = jax.jit(lambda p, x, memory: FED.value_and_grad(of_its_own)(p, x, memory=memory)[0])
    value, found = run(OWN, X, memory)
    h = np.tanh(X @ OWN["a"])
    k = np.tanh(2 * h @ OWN["b"])
    assert_close(value, np.sum(np.sin(k @ OWN["z"])))
    dy = np.cos(k @ OWN["z"])
    dk = 3 * dy @ np.array(memory["z"]).T * (1 - k**2)
    dh = np.clip(2 * dk @ np.array(memory["b"]).T, -0.1, 0.1) * (1 - h**2)
    assert_close(found, {"a": X.T @ dh, "b": 2 * h.T @ dk, "z": k.T @ dy})
    assert np.any(np.abs(dh) == 0.1 * (1 - h**2))


def with_body(body):
    function = jax.custom_vjp(body)
    function.defvjp(lambda x, w: (body(x, w), (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[1]))
    return lambda p, x: jnp.sum(function(jnp.tanh(x @ p["a"]), p["b"]))


@pytest.mark.parametrize("body", [
    lambda x, w: jax.nn.relu(x @ w),       # not linear in the weight
    lambda x, w: (x * x) @ w,              # nor in data
    lambda x, w: (x @ w) * x[:, :1],       # data once more
    lambda x, w: jax.jit(jnp.matmul)(x, w) * jnp.sum(w),
])
def test_a_function_that_is_no_product_is_refused(body):
    with pytest.raises(ValueError, match="is its own and may read the weight anywhere; exp"):
        FED.init(jax.random.key(0), with_body(body), OWN, X)


def test_a_mirror_is_refused_in_both():
    mirror, key = learning.weight_mirror(), jax.random.key(0)
    for loss, params, where in (
        (shared_out(False), PARAMS, "in a shard_map"), (of_its_own, OWN, "with its own derivative")
    ):
        params = jax.tree.map(lambda w: jnp.asarray(w, "float32"), params)
        x = jnp.asarray(X, "float32")
        memory = mirror.init(key, loss, params, x)
        with pytest.raises(ValueError, match=f"whole on each device, got .*{where}: use"):
            mirror.value_and_grad(loss)(params, x, memory=memory)
    direct = learning.direct_feedback_alignment()
    with pytest.raises(ValueError, match="got a product with 'a' in a loop, a branch or a shard_m"):
        direct.init(key, shared_out(True), PARAMS, X)
