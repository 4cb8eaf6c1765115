"""Rules with feedback weights against their papers' formulas, for two layers, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

import fbprop
from fbprop import learning


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
