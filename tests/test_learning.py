"""Learning rules with feedback, on every kind of weighted product, against the same by hand.

The networks here multiply by a function that they are given: `lax`'s own, or one whose derivative
is written out with a feedback weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop import learning, nn, ops

DRAW = np.random.default_rng(3)
OWN = learning.Feedback(lambda key, w: (), lambda state, w: (w, state))  # the weight itself


def plain(x, w, b, product=jnp.matmul):
    return product(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def by_hand(x, w, b, product=jnp.matmul):
    return product(x, w)


def _forward(x, w, b, product):
    return product(x, w), (x, w, b)


def _backward(product, kept, dy):
    x, w, b = kept
    (dx,) = jax.vjp(lambda x: product(x, b), x)[1](dy)
    (dw,) = jax.vjp(lambda w: product(x, w), w)[1](dy)
    return dx, dw, jnp.zeros_like(b)


by_hand.defvjp(_forward, _backward)


LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x, w):
    return lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=LAYOUT)


def depthwise(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=LAYOUT, feature_group_count=4
    )


def upsampled(x, w):
    return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=LAYOUT)


def weights(**shapes):
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=shape) / 2 for name, shape in shapes.items()}


def mlp(mul, p, b, x):
    h = jnp.tanh(mul(x, p["a"], b["a"]) + p["c"])
    return mul(jax.nn.relu(mul(h, p["m"].T, b["m"].T)), p["z"][1], b["z"][1])


def convnet(mul, p, b, x):
    x = x.reshape(2, 2, 3, 1)
    h = jnp.tanh(mul(x, p["a"], b["a"], conv))
    h = jnp.tanh(mul(h, p["d"], b["d"], upsampled))
    return mul(h, p["w"], b["w"], depthwise)


def attention(mul, p, b, x):
    """Projections in one matrix cut in three; the scores' product keeps its derivative."""
    q, k, v = (mul(x, m, f) for m, f in zip(jnp.split(p["qkv"], 3, 1), jnp.split(b["qkv"], 3, 1)))
    shares = jax.nn.softmax(q @ k.T)
    h = mul(shares @ v, p["out"].reshape(4, 4), b["out"].reshape(4, 4))
    table = p["table"].astype(jnp.float32).astype(h.dtype)  # the output is the embedding's
    feedback = b["table"].astype(jnp.float32).astype(h.dtype)
    return mul(p["table"][jnp.arange(2)] + h[:2], table.T, feedback.T)


def recurrent(mul, p, b, x):
    def step(h, now):
        x, w, f = now
        h = jnp.tanh(mul(x[None], p["in"], b["in"]) + mul(h, p["h"], b["h"]))
        return mul(h, w, f), h  # a layer of its own at each step

    def whole(h):
        return lax.scan(step, h, (x, p["layers"], b["layers"]))

    h, hs = jax.checkpoint(whole)(jnp.zeros((1, 4), x.dtype))
    return lax.cond(x[0, 0] > 9, lambda h: h, lambda h: mul(h, p["h"], b["h"]), h), hs


def mapped(mul, p, b, x):
    """Under vmap, and in a jitted function; on the left, as a kernel of an einsum."""
    @jax.jit
    def one(x):
        return mul(p["a"] * 2.0, x, jnp.zeros_like(x)) if mul is plain else left(p["a"] * 2.0, x)

    def left(w, x):
        return mul(x, w, 2.0 * b["a"], lambda x, w: w @ x)

    return mul(jax.nn.relu(jax.vmap(one)(x)), p["z"], b["z"])


NETWORKS = {
    "mlp": (mlp, weights(a=(3, 5), c=(5,), m=(7, 5), z=(2, 7, 2)), (4, 3)),
    "convnet": (convnet, weights(a=(3, 2, 1, 3), d=(2, 2, 3, 4), w=(2, 2, 1, 4)), (4, 3)),
    "attention": (attention, weights(qkv=(3, 12), out=(16,), table=(6, 4)), (5, 3)),
    "recurrent": (recurrent, {"in": weights(a=(3, 4))["a"], **weights(h=(4, 4), layers=(5, 4, 4))},
                  (5, 3)),
    "mapped": (mapped, weights(a=(5, 3), z=(5, 2)), (4, 3)),
}


def size(outs):
    return sum(jnp.sum(jnp.sin(y) * y) for y in jax.tree.leaves(outs))


@pytest.mark.parametrize("name", NETWORKS)
def test_feedback_goes_through_every_product_of_data_with_a_weight(x64, name):
    network, params, shape = NETWORKS[name]
    x = np.random.default_rng(1).normal(size=shape)

    def loss(params, x):
        return size(network(plain, params, params, x))

    method = learning.feedback_alignment()
    memory = method.init(jax.random.key(0), loss, params, x)
    needed = {"mlp": {"m", "z"}, "convnet": {"d", "w"}, "recurrent": {"h", "layers"},
              "mapped": {"z"}}
    assert set(memory) == needed.get(name, {"out", "table"})  # no first layer's
    feedback = params | memory

    @jax.jit
    def both(params, x):
        (value, direction), _ = method.value_and_grad(loss)(params, x, memory=memory)
        (_, own), _ = OWN.value_and_grad(loss)(params, x, memory=dict.fromkeys(memory, ()))
        plain = lambda p: size(network(by_hand, p, feedback, x))
        expected = jax.jit(jax.value_and_grad(plain))(params)
        return (value, direction), expected, own, fbprop.grad(loss)(params, x)

    found, expected, own, gradient = both(params, x)
    assert_close(found, expected)
    assert_close(own, gradient)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found[1], gradient)
    assert max(jax.tree.leaves(moved)) > 0.01  # it is another direction


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), a, b)


def test_a_mirrors_weights_are_what_noise_becomes(x64):
    """The average over keys is W, of a convolution with stride and of a loop's products too."""
    params = weights(a=(3, 4), h=(4, 4), d=(1, 1, 4, 6), z=(6, 2))

    def loss(params, x):
        h, _ = lax.scan(lambda h, x: (jnp.tanh(x @ params["a"] + h @ params["h"]), None),
                        jnp.zeros((50, 4)), x)
        y = lax.conv_general_dilated(h.reshape(2, 5, 5, 4), params["d"], (2, 1), "VALID",
                                     dimension_numbers=LAYOUT)
        return jnp.sum((y @ params["z"]) ** 2)

    x = DRAW.normal(size=(2, 50, 3))
    method = learning.weight_mirror(1.0)
    memory = method.init(jax.random.key(0), loss, params, x)
    assert set(memory) == {"h", "d", "z"}

    def seen(key):
        memory = method.init(key, loss, params, x)
        (_, direction), new = method.value_and_grad(loss)(params, x, memory=memory)
        return {k: m["b"] for k, m in new.items()}, memory, direction

    # One key after the other: convolutions with weights of each key's own are slow on a CPU.
    run = jax.jit(lambda keys: lax.map(seen, keys))
    keys = jax.random.split(jax.random.key(1, impl="rbg"), 300)  # which compiles in less time
    found, memory, direction = run(keys)
    for name, b in found.items():
        error = np.std(b, axis=0).max() / np.sqrt(300)
        np.testing.assert_allclose(np.mean(b, 0), params[name], atol=5 * error)
        assert error < 0.02
    first = {k: m["b"][0] for k, m in memory.items()}
    own = learning.Feedback(lambda key, w: w, lambda b, w: (b, b))
    run = jax.jit(lambda: own.value_and_grad(loss)(params, x, memory=first))
    (_, expected), _ = run()
    assert_close(jax.tree.map(lambda d: d[0], direction), expected)


def test_backpropagation_by_path_is_the_gradient_bit_for_bit():
    network = nn.sequential(nn.dense(5), nn.dense(2))
    x = jnp.ones((4, 3))
    params = network.init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(jnp.sin(network.apply(params, x)))

    method = learning.by_path({"*": learning.backprop()})
    memory = method.init(jax.random.key(0), loss, params, x)
    found, _ = jax.jit(method.value_and_grad(loss))(params, x, memory=memory)
    expected = jax.jit(fbprop.value_and_grad(loss))(params, x)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), found, expected))


def test_a_learned_first_state_is_no_weight_and_one_carried_along_is():
    def loss(params, x):
        def step(carry, x):
            h, u = carry
            return (jnp.tanh(x + h @ u), u), None

        (h, _), _ = lax.scan(step, (params["h"], params["u"]), x)
        return jnp.sum(h @ params["z"])

    params = {"h": jnp.full((1, 3), 0.1), "u": jnp.eye(3), "z": jnp.ones((3, 2))}
    method, x = learning.feedback_alignment(), jnp.full((4, 1, 3), 0.1)
    memory = method.init(jax.random.key(0), loss, params, x)
    assert set(memory) == {"u", "z"}

    @jax.jit
    def three(params, x):
        (_, direction), _ = method.value_and_grad(loss)(params, x, memory=memory)
        (_, own), _ = OWN.value_and_grad(loss)(params, x, memory=dict.fromkeys(memory, ()))
        return direction, own, fbprop.grad(loss)(params, x)

    direction, own, gradient = three(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), own, gradient)
    assert np.max(np.abs(direction["h"] - gradient["h"])) > 1e-3


def test_operations_with_weights_inside_are_taken_apart():
    def loss(params, x, labels):
        h = ops.dense(x, params["a"], params["c"], activation="gelu")
        h = ops.layer_norm(h) * params["scale"]
        return ops.linear_cross_entropy(h, params["z"], labels)

    def in_parts(params, x, labels):
        h = jax.nn.gelu(x @ params["a"] + params["c"], approximate=False)
        h = ops.layer_norm(h) * params["scale"]
        return jnp.mean(ops.softmax_cross_entropy(h @ params["z"], labels))

    params = {k: jnp.asarray(v, "float32") for k, v in weights(a=(3, 5), z=(5, 4)).items()}
    params |= {"c": jnp.ones(5), "scale": jnp.ones(5)}
    x, labels = jnp.ones((2, 3)) * jnp.array([[1.0], [2.0]]), jnp.array([1, 3])
    method = learning.feedback_alignment()
    memory = method.init(jax.random.key(0), loss, params, x, labels)
    assert set(memory) == {"z"}

    @jax.jit
    def both(params):
        return [method.value_and_grad(f)(params, x, labels, memory=memory)[0]
                for f in (loss, in_parts)]

    found, expected = both(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), found, expected)


def test_a_looped_networks_feedback_costs_what_backpropagation_does():
    """Per compiled program: products are those of backpropagation, the loop's in one go too."""
    cell = nn.lstm(32, last=True)
    x = jnp.ones((4, 16, 8))
    params = {"cell": cell.init(jax.random.key(0), x), "head": jnp.ones((32, 3))}

    def loss(params, x):
        return jnp.sum(jnp.tanh(cell.apply(params["cell"], x) @ params["head"]))

    method = learning.feedback_alignment()
    memory = method.init(jax.random.key(0), loss, params, x)
    assert set(memory) == {"cell/recurrent", "head"}
    run = jax.jit(lambda p, x, m: method.value_and_grad(loss)(p, x, memory=m)[0])
    ours = run.lower(params, x, memory).compile()
    theirs = jax.jit(fbprop.value_and_grad(loss)).lower(params, x).compile()
    costs = [program.cost_analysis() for program in (ours, theirs)]
    assert costs[0]["flops"] <= 1.05 * costs[1]["flops"]
    assert costs[0]["bytes accessed"] <= 1.05 * costs[1]["bytes accessed"]
