"""Layers with state, norms, and what is composed of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import fbprop
from fbprop import nn, optim, train

KEY = jax.random.key(0)


def normal(shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def counter():
    """A layer that counts how often it was trained, and adds its count."""
    def apply(params, x, *, train, state):
        new = {"seen": state["seen"] + jnp.int32(train)}
        return x + new["seen"].astype(x.dtype), new

    return nn.Layer(lambda key, x: {}, apply, "counter", lambda x: {"seen": jnp.int32(0)})


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3, 2), (2, 7, 3)])
def test_batch_norm_equals_its_formula(x64, shape):
    layer = nn.batch_norm(momentum=0.7, epsilon=0.1, dtype=jnp.float64)
    x = normal(shape) * 3 + 5
    params = {"scale": normal(shape[-1:], seed=1), "bias": normal(shape[-1:], seed=2)}
    assert jax.tree.map(jnp.shape, layer.init(KEY, x)) == jax.tree.map(jnp.shape, params)
    rows = np.asarray(x).reshape(-1, shape[-1])
    state, mean, variance = layer.init_state(x), 0, 1
    for _ in range(3):
        y, state = layer.apply(params, x, train=True, state=state)
        mean, variance = 0.7 * mean + 0.3 * rows.mean(0), 0.7 * variance + 0.3 * rows.var(0)
    expected = (np.asarray(x) - rows.mean(0)) / np.sqrt(rows.var(0) + 0.1)
    chex.assert_trees_all_close(y, expected * params["scale"] + params["bias"], rtol=1e-12)
    chex.assert_trees_all_close(state, {"mean": mean, "variance": variance}, rtol=1e-12)


def test_batch_norm_in_use_takes_the_running_statistics_and_keeps_them(x64):
    layer, x = nn.batch_norm(scale=False, dtype=jnp.float64), normal((5, 3))
    state = {"mean": normal(3, seed=1), "variance": jnp.abs(normal(3, seed=2))}
    params = layer.init(KEY, x)
    assert set(params) == {"bias"}
    y, same = layer.apply(params, x, state=state)
    expected = (np.asarray(x) - state["mean"]) / np.sqrt(state["variance"] + 1e-5)
    chex.assert_trees_all_close(y, expected, rtol=1e-12)
    chex.assert_trees_all_equal(same, state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_batch_norm_keeps_dtype_and_wide_statistics(x64, dtype):
    layer, x = nn.batch_norm(dtype=dtype), normal((5, 3), dtype)
    y, state = layer.apply(layer.init(KEY, x), x, train=True, state=layer.init_state(x))
    assert y.dtype == dtype
    wide = "float64" if dtype == "float64" else "float32"
    assert {s.dtype.name for s in jax.tree.leaves((layer.init_state(x), state))} == {wide}
    again, _ = layer.apply(layer.init(KEY, x), x, state=state)
    assert again.dtype == dtype


def test_batch_norm_far_from_zero_keeps_its_digits():
    x = normal((101, 1), np.float32) + 1000
    squares = np.mean(np.square(x)) - np.square(np.mean(x))
    assert abs(squares - np.asarray(x, np.float64).var()) > 0.01  # E[x²] − E[x]²
    layer = nn.batch_norm(momentum=0.0)
    _, state = layer.apply(layer.init(KEY, x), x, train=True, state=layer.init_state(x))
    np.testing.assert_allclose(state["variance"], np.asarray(x, np.float64).var(0), rtol=1e-5)


def test_batch_norm_gradient_is_that_of_jax(x64):
    layer, x = nn.batch_norm(dtype=jnp.float64), normal((2, 3, 5, 2))
    weight = normal(x.shape, seed=1)

    def loss(params, x, state):
        y, state = layer.apply(params, x, train=True, state=state)
        return jnp.sum(weight * y), state

    args = {"scale": normal(2), "bias": normal(2)}, x, layer.init_state(x)
    ours, state = jax.jit(fbprop.grad(loss, argnums=(0, 1), has_aux=True))(*args)
    theirs, same = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*args)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-11, atol=1e-13)
    chex.assert_trees_all_close(state, same, rtol=1e-14)


def test_batch_norm_over_devices_is_that_of_the_whole_batch(x64):
    x = normal((6, 5, 3))
    alone = nn.batch_norm(dtype=jnp.float64)
    together = nn.batch_norm(axis_name="d", dtype=jnp.float64)
    params, state = alone.init(KEY, x), alone.init_state(x)

    def value_and_grad_of(layer):
        def loss(params, x):
            y, new = layer.apply(params, x, train=True, state=state)
            return jnp.sum(jnp.sin(y)), (y, new)

        return fbprop.value_and_grad(loss, argnums=1, has_aux=True)

    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda p, x: (lambda out: (out[0][1], out[1]))(value_and_grad_of(together)(p, x)),
        mesh=mesh, in_specs=(P(), P("d")), out_specs=((P("d"), P()), P("d")),
    )
    (y, new), parts = jax.jit(mapped)(params, x)
    (_, expected), dx = jax.jit(value_and_grad_of(alone))(params, x)
    chex.assert_trees_all_close(((y, new), parts), (expected, dx), rtol=1e-11, atol=1e-14)
    each = jax.vmap(lambda x: together.apply(params, x, train=True, state=state)[0], axis_name="d")
    chex.assert_trees_all_close(each(x.reshape(2, 3, 5, 3)).reshape(x.shape), y, rtol=1e-12)


def test_rms_norm_equals_its_formula(x64):
    x, scale = normal((2, 3, 5)), normal(5, seed=1)
    expected = np.asarray(x) / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 0.1) * scale
    layer = nn.rms_norm(epsilon=0.1, dtype=jnp.float64)
    chex.assert_trees_all_close(layer.apply({"scale": scale}, x), expected, rtol=1e-12)
    assert nn.rms_norm(scale=False).init(KEY, x) == {}


def test_group_norm_equals_layer_norm_of_each_group(x64):
    x = normal((2, 3, 5, 6))
    layer = nn.group_norm(3, dtype=jnp.float64)
    params = {"scale": normal(6, seed=1), "bias": normal(6, seed=2)}
    groups = np.asarray(x).reshape(2, 3, 5, 3, 2)
    mean, var = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    expected = expected * params["scale"] + params["bias"]
    chex.assert_trees_all_close(layer.apply(params, x), expected, rtol=1e-12)
    row, one = normal((5, 6)), nn.group_norm(1, dtype=jnp.float64)
    same = nn.layer_norm(dtype=jnp.float64).apply(params, row)
    chex.assert_trees_all_close(one.apply(params, row), same, rtol=1e-12)


def test_states_are_collected_by_name_and_handed_on():
    net = nn.sequential(
        counter(), nn.relu(), nn.repeated(counter(), 3),
        nn.residual(counter(), nn.dense(2), shortcut=nn.sequential(counter(), nn.dense(2))),
    )
    x = jnp.ones((1, 2))
    state = net.init_state(x)
    zero = jnp.int32(0)
    assert net.stateful
    chex.assert_trees_all_equal(state, {
        "counter": {"seen": zero}, "repeated": {"counter": {"seen": jnp.zeros(3, jnp.int32)}},
        "residual": {"counter": {"seen": zero}, "shortcut": {"counter": {"seen": zero}}},
    })
    y, new = net.apply(net.init(KEY, x), x, train=True, state=state)
    chex.assert_trees_all_equal(new, jax.tree.map(lambda s: s + 1, state))
    _, same = net.apply(net.init(KEY, x), x, state=new)
    chex.assert_trees_all_equal(same, new)
    assert y.shape == (1, 2)


def test_a_layer_without_state_returns_the_state_it_is_given():
    net = nn.sequential(nn.relu(), nn.repeated(nn.tanh(), 2))
    x = jnp.ones(3)
    assert not net.stateful
    assert net.init_state(x) == {}
    y, state = net.apply({}, x, state={"anything": 1})
    assert state == {"anything": 1}
    chex.assert_trees_all_equal(y, net.apply({}, x))


def test_a_layer_is_given_the_keywords_that_it_names():
    layers = {
        "all": (lambda params, x, **told: sorted(told), ["key", "lengths", "state", "train"]),
        "some": (lambda params, x, *, lengths, train: (lengths, train), (7, True)),
        "none": (lambda params, x: x, 3),
    }
    for name, (apply, expected) in layers.items():
        layer = nn.Layer(lambda key, x: {}, apply, name)
        assert layer.apply({}, 3, lengths=7, train=True) == expected


def dropping_block(dtype):
    return nn.residual(nn.dense(5, dtype=dtype), nn.batch_norm(dtype=dtype), nn.tanh(),
                       nn.dropout(0.3), name="block")


@pytest.mark.parametrize("remat", [False, True])
def test_repeated_equals_the_blocks_in_sequence(x64, remat):
    block, x = dropping_block(jnp.float64), normal((3, 5))
    loop = nn.repeated(block, 3, remat=remat, name="loop")
    chain = nn.sequential(*[block] * 3, name="chain")
    params, state = jax.jit(chain.init)(KEY, x), chain.init_state(x)

    def stack(tree):
        return {"block": jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree.values())}

    def run(net):
        def loss(params, x, state):
            y, new = net.apply(params, x, key=KEY, train=True, state=state)
            return jnp.sum(jnp.sin(y)), new

        return jax.jit(fbprop.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    (value, new), (grads, dx) = run(chain)(params, x, state)
    got = run(loop)(stack(params), x, stack(state))
    # Before batch norm a bias has a gradient of 0, of which rounding is left.
    expected = (value, stack(new)), (stack(grads), dx)
    chex.assert_trees_all_close(got, expected, rtol=1e-11, atol=1e-14)
    assert jax.tree.map(jnp.shape, loop.init(KEY, x)) == jax.tree.map(jnp.shape, stack(params))
    chex.assert_trees_all_equal(loop.init_state(x), stack(state))


def test_repeated_blocks_start_different():
    kernels = nn.repeated(nn.dense(3), 2).init(KEY, jnp.ones((1, 3)))["dense"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_residual_adds_branch_and_shortcut(x64):
    x = normal((2, 3))
    plain = nn.residual(nn.dense(3, dtype=jnp.float64), nn.tanh())
    params = plain.init(KEY, x)
    assert set(params) == {"dense"}
    expected = x + jnp.tanh(x @ params["dense"]["kernel"])
    chex.assert_trees_all_close(plain.apply(params, x), expected, rtol=1e-12)
    both = nn.residual(nn.dense(5, dtype=jnp.float64),
                       shortcut=nn.dense(5, bias=False, dtype=jnp.float64))
    params = both.init(KEY, x)
    expected = x @ params["dense"]["kernel"] + x @ params["shortcut"]["kernel"]
    chex.assert_trees_all_close(both.apply(params, x), expected, rtol=1e-12)
    assert not np.array_equal(params["dense"]["kernel"], params["shortcut"]["kernel"])


def test_scopes_of_composed_layers_are_the_paths_of_the_parameters():
    net = nn.sequential(nn.residual(nn.dense(3), shortcut=nn.dense(3)), nn.attention(1), name="net")
    x = jnp.ones((2, 2, 3))
    params = net.init(KEY, x)
    products = [e for e in jax.make_jaxpr(net.apply)(params, x).eqns
                if e.primitive.name == "dot_general"]
    scopes = {str(e.source_info.name_stack) for e in products}
    paths = {"/".join(k.key for k in path[:-1]) for path, _ in jax.tree.leaves_with_path(params)}
    # einsum names a scope after its subscripts.
    assert scopes - {s for s in scopes if "->" in s} == {f"net/{path}" for path in paths}
    assert {s.rpartition("/")[0] for s in scopes if "->" in s} == {"net/attention"}


def test_running_statistics_in_a_training_step():
    net = nn.sequential(nn.dense(3), nn.batch_norm(momentum=0.5), nn.dense(1))
    x = normal((4, 2), jnp.float32)
    params, state = net.init(KEY, x), net.init_state(x)

    def loss(params, batch, key, model_state):
        y, model_state = net.apply(params, batch, key=key, train=True, state=model_state)
        return jnp.mean(jnp.square(y - 1)), {}, model_state

    one = train.step(loss, optim.sgd(0.0))
    start = train.init(params, optim.sgd(0.0), model_state=state)
    after, _ = one(start, x)
    hidden = x @ params["dense_0"]["kernel"]
    expected = {"mean": hidden.mean(0) / 2, "variance": hidden.var(0) / 2 + 0.5}
    chex.assert_trees_all_close(after.model_state, {"batch_norm": expected}, rtol=1e-5)
    pieces = train.step(loss, optim.sgd(0.0), accumulate=2)
    after, _ = pieces(train.init(params, optim.sgd(0.0), model_state=state), x)
    mean = (hidden[:2].mean(0) / 2 + hidden[2:].mean(0)) / 2
    chex.assert_trees_all_close(after.model_state["batch_norm"]["mean"], mean, rtol=1e-5)


def test_out_shape_computes_nothing_and_is_right():
    net = nn.sequential(nn.conv(5, stride=2), nn.batch_norm(), nn.flatten(), nn.dense(3))
    x = jax.ShapeDtypeStruct((2, 10**6, 10**6, 3), jnp.float32)
    assert nn.conv(5, stride=2).out_shape(x).shape == (2, 500_000, 500_000, 5)
    small = jnp.ones((2, 4, 6, 3))
    y, _ = net.apply(net.init(KEY, small), small, state=net.init_state(small))
    assert (net.out_shape(small).shape, net.out_shape(small).dtype) == (y.shape, y.dtype)


X = jnp.ones((2, 3))
ERRORS = {
    "no_state": (ValueError, r"'batch_norm' keeps a state, got state=None.*init_state\(x\)",
                 lambda: nn.batch_norm().apply({}, X)),
    "no_state_inside": (ValueError, "'sequential' keeps a state, got state=None",
                        lambda: nn.sequential(nn.batch_norm()).apply({}, X, train=True)),
    "state_of_another": (ValueError, "'batch_norm' keeps a state, got state=None",
                         lambda: nn.sequential(nn.batch_norm()).apply({}, X, state={"b": 1})),
    "state_by_shape": (TypeError, r"got \(2, 3\) expected an array or a jax.ShapeDtypeStruct",
                       lambda: nn.batch_norm().init_state((2, 3))),
    "momentum": (ValueError, r"momentum is the weight of the past, got 10 expected.*\[0, 1\]",
                 lambda: nn.batch_norm(momentum=10)),
    "groups": (ValueError, "'group_norm'.*got groups=2 expected a divisor of 3 channels",
               lambda: nn.group_norm(2).apply({}, X)),
    "branch": (ValueError, r"'residual'.*got shapes \(2, 5\) and \(2, 3\) expected equal",
               lambda: nn.residual(nn.dense(5)).apply(
                   nn.sequential(nn.dense(5)).init(KEY, X), X)),
    "times": (ValueError, "repeated at least once, got n=0 expected n >= 1",
              lambda: nn.repeated(nn.dense(3), 0)),
    "shape": (ValueError, r"'repeated' feeds 'dense' its own output, got float32\[2, 5\] expected "
                          r"float32\[2, 3\]", lambda: nn.repeated(nn.dense(5), 2).init(KEY, X)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
