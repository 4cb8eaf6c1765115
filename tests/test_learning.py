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
        expected = jax.value_and_grad(lambda p: size(network(by_hand, p, feedback, x)))(params)
        return (value, direction), expected, own, fbprop.grad(loss)(params, x)

    found, expected, own, gradient = both(params, x)
    assert_close(found, expected)
    assert_close(own, gradient)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found[1], gradient)
    assert max(jax.tree.leaves(moved)) > 0.01  # it is another direction


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), a, b)


def two_layers(params, x, y):
    h = jnp.tanh(x @ params["a"])
    return 0.5 * jnp.sum((h @ params["b"] - y) ** 2)


def problem():
    draw = np.random.default_rng(2)
    params = {"a": draw.normal(size=(3, 5)), "b": draw.normal(size=(5, 2))}
    return params, draw.normal(size=(7, 3)), draw.normal(size=(7, 2))


def numpy_direction(p, feedback, x, y):
    h = np.tanh(x @ p["a"])
    error = h @ p["b"] - y
    return {"a": x.T @ ((error @ feedback.T) * (1 - h**2)), "b": h.T @ error}


def test_feedback_alignment_is_the_papers_formula(x64):
    params, x, y = problem()
    method = learning.feedback_alignment(scale=2.0)
    memory = method.init(jax.random.key(0), two_layers, params, x, y)
    rms = np.sqrt(np.mean(params["b"] ** 2))
    assert 0.5 < np.sqrt(np.mean(memory["b"] ** 2)) / (2 * rms) < 1.5
    (_, direction), same = method.value_and_grad(two_layers)(params, x, y, memory=memory)
    assert_close(direction, numpy_direction(params, np.array(memory["b"]), x, y))
    assert same is not memory
    assert_close(same, memory)


def test_feedback_is_not_the_weight_where_the_key_is_the_same():
    key = jax.random.key(0)
    keys = jax.random.split(key, 40)
    params = {i: jax.random.normal(keys[i], (50, 50)) for i in range(40)}

    def loss(params, x):
        for i in range(40):
            x = jnp.tanh(x @ params[i])
        return jnp.sum(x)

    memory = learning.feedback_alignment().init(key, loss, params, jnp.ones((1, 50)))
    for b in memory.values():
        for w in params.values():
            assert abs(np.corrcoef(b.ravel(), w.ravel())[0, 1]) < 0.15


def test_sign_symmetry_has_the_weights_signs(x64):
    params, x, y = problem()
    signs = np.sign(params["b"])
    for form in ("uniform", "batch_random", "fixed_random"):
        method = learning.sign_symmetry(form)
        memory = method.init(jax.random.key(0), two_layers, params, x, y)
        run = jax.jit(lambda memory: method.value_and_grad(two_layers)(params, x, y, memory=memory))
        (_, first), new = run(memory)
        (_, second), _ = run(new)
        if form == "uniform":
            sizes = np.sqrt(np.mean(params["b"] ** 2))
        elif form == "fixed_random":
            sizes = np.array(memory["b"])
        else:
            now = jax.random.split(memory["b"]["key"])[1]
            sizes = memory["b"]["size"] * np.abs(jax.random.normal(now, (5, 2)))
            assert np.abs(first["a"] - second["a"]).max() > 0.01
        if form != "batch_random":
            assert_close(first, second)
        assert_close(first, numpy_direction(params, sizes * signs, x, y))


def test_kolen_pollacks_weights_come_together(x64):
    params, x, y = problem()
    method, rate, decay = learning.kolen_pollack(0.1), 0.01, 0.1
    memory = method.init(jax.random.key(0), two_layers, params, x, y)
    p, b = params, np.array(memory["b"])
    apart = params["b"] - b
    for _ in range(10):
        (_, direction), memory = method.value_and_grad(two_layers)(params, x, y, memory=memory)
        updates = jax.tree.map(lambda d: -rate * d, direction)
        updates, memory = method.update(updates, params, memory)
        params = fbprop.optim.apply_updates(params, updates)
        step = numpy_direction(p, b, x, y)
        p = {k: (1 - decay * (k == "b")) * p[k] - rate * step[k] for k in p}
        b = (1 - decay) * b - rate * step["b"]
    assert_close(params, p)
    assert_close(memory["b"], b)
    assert_close(params["b"] - memory["b"], apart * 0.9**10)


def test_product_feedback_comes_to_point_as_the_weight_does(x64):
    params, x, y = problem()
    method, rate, decay = learning.product_feedback(0.1, expansion=8.0), 0.01, 0.1
    memory = method.init(jax.random.key(0), two_layers, params, x, y)
    p, state = params, jax.tree.map(np.array, memory["b"])
    fixed, learned = state["fixed"], state["learned"]
    for _ in range(10):
        (_, direction), memory = method.value_and_grad(two_layers)(params, x, y, memory=memory)
        updates = jax.tree.map(lambda d: -rate * d, direction)
        updates, memory = method.update(updates, params, memory)
        params = fbprop.optim.apply_updates(params, updates)
        step = numpy_direction(p, learned @ fixed, x, y)
        p = {k: (1 - decay * (k == "b")) * p[k] - rate * step[k] for k in p}
        learned = (1 - decay) * learned - rate * step["b"] @ fixed.T
    assert_close((params, memory["b"]["learned"]), (p, learned))

    @jax.jit
    def later(_, carry):  # W and P forget where they began
        params, memory = carry
        (_, direction), memory = method.value_and_grad(two_layers)(params, x, y, memory=memory)
        updates = jax.tree.map(lambda d: -rate * d, direction)
        updates, memory = method.update(updates, params, memory)
        return jax.tree.map(jnp.add, params, updates), memory

    params, memory = jax.lax.fori_loop(0, 300, later, (params, memory))
    b = memory["b"]["learned"] @ memory["b"]["fixed"]
    assert_close(memory["b"]["learned"], params["b"] @ fixed.T)
    cosine = np.sum(b * params["b"]) / np.linalg.norm(b) / np.linalg.norm(params["b"])
    assert cosine > 0.9  # cos(arctan √(1 / 8)) = 0.94


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

    @jax.jit
    @jax.vmap
    def seen(key):
        memory = method.init(key, loss, params, x)
        (_, direction), new = method.value_and_grad(loss)(params, x, memory=memory)
        return {k: m["b"] for k, m in new.items()}, memory, direction

    found, memory, direction = seen(jax.random.split(jax.random.key(1), 300))
    for name, b in found.items():
        error = np.std(b, axis=0).max() / np.sqrt(300)
        np.testing.assert_allclose(np.mean(b, 0), params[name], atol=5 * error)
        assert error < 0.02
    first = {k: m["b"][0] for k, m in memory.items()}
    own = learning.Feedback(lambda key, w: w, lambda b, w: (b, b))
    (_, expected), _ = own.value_and_grad(loss)(params, x, memory=first)
    assert_close(jax.tree.map(lambda d: d[0], direction), expected)


def test_a_blends_feedback_is_annealed_to_the_weight(x64):
    params, x, y = problem()
    rule = learning.kolen_pollack(0.1)
    method = learning.blend(rule, lambda count: jnp.where(count < 1, 0.75, 0.0))
    memory = method.init(jax.random.key(0), two_layers, params, x, y)
    b = np.array(memory["b"]["rule"])
    (_, direction), memory = method.value_and_grad(two_layers)(params, x, y, memory=memory)
    assert_close(direction, numpy_direction(params, 0.75 * b + 0.25 * params["b"], x, y))
    updates, learned = method.update(direction, params, memory)
    assert_close(updates["b"], direction["b"] - 0.1 * params["b"])
    assert_close(learned["b"]["rule"], 0.9 * b + direction["b"])
    (_, direction), _ = method.value_and_grad(two_layers)(params, x, y, memory=memory)
    assert_close(direction, fbprop.grad(two_layers)(params, x, y))


def test_a_blend_of_directions(x64):
    params, x, y = problem()
    rule = learning.direct_kolen_pollack(0.1)
    method = learning.blend(rule, 0.25)
    memory = method.init(jax.random.key(0), two_layers, params, x, y)
    (_, mixed), new = method.value_and_grad(two_layers)(params, x, y, memory=memory)
    (_, direction), rules = rule.value_and_grad(two_layers)(params, x, y, memory=memory["rule"])
    gradient = fbprop.grad(two_layers)(params, x, y)
    assert_close(mixed, jax.tree.map(lambda d, g: 0.25 * d + 0.75 * g, direction, gradient))
    assert_close(new["rule"], rules)
    found = method.update(mixed, params, new)
    expected = rule.update(mixed, params, rules)
    assert_close((found[0], found[1]["rule"]), expected)


def test_rules_by_path_act_in_one_sweep(x64):
    params, x, y = problem()
    feedback, own = learning.feedback_alignment(), learning.backprop()
    method = learning.by_path({"b": feedback, "*": own})
    memory = method.init(jax.random.key(0), two_layers, params, x, y)
    assert [set(m) for m in memory] == [{"b"}, set()]
    (_, direction), _ = method.value_and_grad(two_layers)(params, x, y, memory=memory)
    assert_close(direction, numpy_direction(params, np.array(memory[0]["b"]), x, y))
    other = learning.by_path({"a": feedback, "*": own})
    memory = other.init(jax.random.key(0), two_layers, params, x, y)
    (_, direction), _ = other.value_and_grad(two_layers)(params, x, y, memory=memory)
    assert_close(direction, fbprop.grad(two_layers)(params, x, y))


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


def test_auxiliary_results_and_rules_pass_through(x64):
    params, x, y = problem()
    zero = fbprop.rule("tanh", "x̄ = 0", x=lambda dy: 0 * dy)
    method = learning.feedback_alignment()
    memory = method.init(jax.random.key(0), two_layers, params, x, y)

    def loss(params, x, y):
        return two_layers(params, x, y), {"loss": two_layers(params, x, y)}

    run = method.value_and_grad(loss, has_aux=True, rules=fbprop.table.override(zero))
    ((value, aux), direction), _ = run(params, x, y, memory=memory)
    assert float(value) == float(aux["loss"])
    assert not np.any(direction["a"])


def test_alignment_is_cosine_and_ratio(x64):
    params, x, y = problem()
    method = learning.feedback_alignment()
    memory = method.init(jax.random.key(0), two_layers, params, x, y)
    found = learning.alignment(method, two_layers)(params, x, y, memory=memory)
    d = numpy_direction(params, np.array(memory["b"]), x, y)
    g = numpy_direction(params, params["b"], x, y)
    norm = np.linalg.norm
    assert_close(found.cosine["a"], np.sum(d["a"] * g["a"]) / norm(d["a"]) / norm(g["a"]))
    assert_close(found.ratio["a"], norm(d["a"]) / norm(g["a"]))
    assert_close(found.cosine["b"], 1.0)
    flat = [np.concatenate([t["a"].ravel(), t["b"].ravel()]) for t in (d, g)]
    assert_close(found.total, flat[0] @ flat[1] / norm(flat[0]) / norm(flat[1]))


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
    (_, direction), _ = method.value_and_grad(loss)(params, x, memory=memory)
    (_, own), _ = OWN.value_and_grad(loss)(params, x, memory=dict.fromkeys(memory, ()))
    gradient = fbprop.grad(loss)(params, x)
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


def test_under_sharding_and_vmap():
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, "float32"), problem())
    x, y = jnp.concatenate([x, x[:1]]), jnp.concatenate([y, y[:1]])
    method = learning.feedback_alignment()
    memory = method.init(jax.random.key(0), two_layers, params, x, y)
    whole = method.value_and_grad(two_layers)
    run = jax.jit(lambda x, y, memory: whole(params, x, y, memory=memory))
    (_, direction), _ = run(x, y, memory)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    shared = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    (_, other), _ = run(*jax.device_put((x, y), shared), memory)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-5), direction, other)
    memories = jax.tree.map(lambda b: jnp.stack([b, 2 * b]), memory)
    (_, several), _ = jax.vmap(run, (None, None, 0))(x, y, memories)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], 2e-5, 1e-5), direction, several)
    np.testing.assert_allclose(several["a"][1], 2 * direction["a"], 2e-5)
    np.testing.assert_allclose(several["b"][1], direction["b"], 2e-5)
