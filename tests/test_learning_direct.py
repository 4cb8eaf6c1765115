"""Direct feedback alignment: the output's error, to every layer through a matrix of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import learning, nn

DRAW = np.random.default_rng(0)


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), a, b)


def dense(n, m):
    return {"w": DRAW.normal(size=(n, m)) / 2, "b": DRAW.normal(size=m)}


def loss(params, x, y):
    h = x
    for layer in params[:-1]:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    return 0.5 * jnp.sum((h @ params[-1]["w"] + params[-1]["b"] - y) ** 2)


PARAMS = [dense(3, 5), dense(5, 6), dense(6, 2)]
X, Y = DRAW.normal(size=(7, 3)), DRAW.normal(size=(7, 2))


def by_numpy(params, memory, x, y):
    """The paper's formula; also ēᵀ x, of which direct feedback learns."""
    h = [x]
    for layer in params[:-1]:
        h.append(np.tanh(h[-1] @ layer["w"] + layer["b"]))
    error = h[-1] @ params[-1]["w"] + params[-1]["b"] - y
    deltas = [(error @ np.array(memory[f"{i + 1}/w"])) * (1 - h[i + 1] ** 2) for i in range(2)]
    deltas.append(error)
    direction = [{"w": a.T @ d, "b": d.sum(0)} for a, d in zip(h, deltas)]
    return direction, {f"{i}/w": error.T @ h[i] for i in (1, 2)}


def test_direct_feedback_alignment_is_the_papers_formula(x64):
    method = learning.direct_feedback_alignment(scale=2.0)
    memory = method.init(jax.random.key(0), loss, PARAMS, X, Y)
    assert {k: b.shape for k, b in memory.items()} == {"1/w": (2, 5), "2/w": (2, 6)}
    assert 0.5 < np.std(memory["2/w"]) * np.sqrt(6) / 2 < 1.5

    def with_aux(params, x, y):
        return loss(params, x, y), {"n": x.shape[0] * jnp.ones(())}

    run = jax.jit(method.value_and_grad(with_aux, has_aux=True))
    ((value, aux), direction), same = run(PARAMS, X, Y, memory=memory)
    assert_close(value, loss(PARAMS, X, Y))
    assert float(aux["n"]) == 7
    assert_close(direction, by_numpy(PARAMS, memory, X, Y)[0])
    assert_close(same, memory)


def test_direct_kolen_pollack_learns_from_error_and_activity(x64):
    rate, decay = 0.01, 0.1
    method = learning.direct_kolen_pollack(rate, decay)
    params, memory = PARAMS, method.init(jax.random.key(0), loss, PARAMS, X, Y)
    p, m = params, jax.tree.map(np.array, memory)
    apart = p[2]["w"] - m["2/w"].T

    @jax.jit
    def step(params, memory):
        (_, direction), memory = method.value_and_grad(loss)(params, X, Y, memory=memory)
        updates = jax.tree.map(lambda d: -rate * d, direction)
        updates, memory = method.update(updates, params, memory)
        return fbprop.optim.apply_updates(params, updates), memory

    for _ in range(5):
        params, memory = step(params, memory)
        steps, moved = by_numpy(p, m, X, Y)
        keep = lambda i, k: 1 - decay * (i > 0 and k == "w")
        p = [{k: keep(i, k) * v - rate * steps[i][k] for k, v in q.items()}
             for i, q in enumerate(p)]
        m = {k: (1 - decay) * b - rate * moved[k] for k, b in m.items()}
    assert_close((params, memory), (p, m))
    assert_close(params[2]["w"] - memory["2/w"].T, apart * 0.9**5)


@pytest.mark.parametrize("rule", [
    learning.direct_feedback_alignment,
    lambda **options: learning.direct_kolen_pollack(0.1, **options),
])
def test_computed_again_it_is_the_same(x64, rule):
    """With pooling, a call, what closes over data, integers and results that are no loss."""
    @jax.jit
    def block(p, h):
        return jax.nn.relu(h @ p["w"] + p["b"])

    def value(params, x, y):
        h = jnp.where(jnp.arange(3) > 0, x, 0)
        for layer in params[:-1]:
            h = block(layer, h)
        z = h @ params[-1]["w"] + params[-1]["b"]
        return 0.5 * jnp.sum((z - y) ** 2), {"z": z, "size": jnp.mean(jnp.abs(h)), "x": x}

    plain, again = rule(), rule(recompute=True)
    memory = plain.init(jax.random.key(0), value, PARAMS, X, Y)

    @jax.jit
    def both(params, memory):
        return [m.value_and_grad(value, has_aux=True)(params, X, Y, memory=memory)
                for m in (plain, again)]

    assert_close(*both(PARAMS, memory))

    def residual(params, x, y):
        h = jnp.tanh(x @ params[0]["w"])
        return jnp.sum((h + jnp.tanh(h @ params[1]["w"])[:, :5]) @ params[2]["w"][:5])

    memory = again.init(jax.random.key(0), residual, PARAMS, X, Y)
    with pytest.raises(ValueError, match="got 1 more values past the product with '1/w'"):
        again.value_and_grad(residual)(PARAMS, X, Y, memory=memory)


def test_computed_again_16_layers_take_less_memory():
    params = [jnp.ones((64, 64))] * 16
    x = jnp.ones((256, 64))

    def deep(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x[:, :4] ** 2)

    method = learning.direct_feedback_alignment(recompute=True)
    memory = method.init(jax.random.key(0), deep, params, x)

    def bytes_of(run, *args):
        return jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes

    ours = bytes_of(lambda p, x, m: method.value_and_grad(deep)(p, x, memory=m), params, x, memory)
    assert ours < 0.6 * bytes_of(fbprop.value_and_grad(deep), params, x)


def test_a_convolutional_and_a_token_network():
    """Leading dimensions that error and layer share stay apart; the last layer's W̄ is true."""
    images = jnp.asarray(DRAW.normal(size=(4, 6, 6, 1)), "float32")
    tokens = jnp.arange(10).reshape(2, 5)
    convnet = nn.sequential(nn.conv(3), nn.tanh(), nn.conv(2, stride=2), nn.tanh(), nn.flatten(),
                            nn.dense(5))
    gpt = nn.sequential(nn.embedding(10, 6), nn.dense(7), nn.dense(10))
    method = learning.direct_feedback_alignment()
    for network, x, shapes in (
        (convnet, images, [(5, 108), (5, 18)]), (gpt, tokens, [(10, 6), (10, 7)]),
    ):
        def value(params, x, network=network):
            return jnp.mean(network.apply(params, x) ** 2)

        @jax.jit
        def begun(x, network=network, value=value):
            params = network.init(jax.random.key(0), x)
            return params, method.init(jax.random.key(1), value, params, x)

        params, memory = begun(x)
        assert sorted(b.shape for b in memory.values()) == sorted(shapes)
        found = learning.alignment(method, value)(params, x, memory=memory)
        assert min(jax.tree.leaves(found.cosine)) < 0.99
        last = found.cosine["dense" if "dense" in params else "dense_1"]
        np.testing.assert_allclose([*last.values()], 1, rtol=1e-5)


def test_what_direct_feedback_cannot_serve():
    method, x, w = learning.direct_feedback_alignment(), jnp.ones((4, 3)), jnp.ones((3, 3))
    cell = nn.lstm(3, last=True)
    params = cell.init(jax.random.key(0), x[None])
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="got a product with 'kernel' in a loop, a branch"):
        method.init(key, lambda p, x: jnp.sum(cell.apply(p, x)), params, x[None])
    with pytest.raises(ValueError, match="got 'w' in 2 products expected one"):
        method.init(key, lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["w"]), {"w": w}, x)
    with pytest.raises(ValueError, match=r"first dimensions, got \[4, 3\] for 'b' and \[5, 2\]"):
        method.init(key, lambda p, x: jnp.sum(jnp.resize(jnp.tanh(x @ p["a"]) @ p["b"], (5, 2))
                                              @ p["c"]),
                    {"a": w, "b": w[:, :2], "c": w[:2, :2]}, x)
    with pytest.raises(ValueError, match="a loss without one"):
        method.init(key, lambda p, x: jnp.sum(x * p), x, x)
    with pytest.raises(ValueError, match="got rate=-1"):
        learning.direct_kolen_pollack(-1)
    with pytest.raises(ValueError, match="got decay=1"):
        learning.direct_kolen_pollack(0.1, 1)
    with pytest.raises(ValueError, match=r"got expansion=0 expected more than 0"):
        learning.product_feedback(expansion=0)
    run = method.value_and_grad(lambda p, x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"]))
    with pytest.raises(ValueError, match="got none for 'b'"):
        run({"a": w, "b": w}, x, memory={})
