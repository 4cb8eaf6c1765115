"""Learning rules that look at one layer at a time, against their papers' formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import learning

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
PARAMS = [DRAW.normal(size=s) / 2 for s in ((6, 5), (5, 4), (4, 3))]
X, Y = DRAW.normal(size=(7, 6)), DRAW.normal(size=(7, 3))
LAYERS = [lambda p, h: jnp.tanh(h @ p)] * 2 + [lambda p, h: h @ p]


def criterion(z, y):
    return jnp.mean(jnp.sum((z - y) ** 2, -1)) / 2


def loss(params, x, y):
    for layer, p in zip(LAYERS, params):
        x = layer(p, x)
    return criterion(x, y)


def assert_close(a, b, **options):
    options = options or {"rtol": 1e-10, "atol": 1e-12}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), a, b)


def run(method, memory=None, params=PARAMS, loss=loss, y=Y):
    memory = method.init(KEY, loss, params, X, y) if memory is None else memory
    step = jax.jit(lambda p, x, y, memory: method.value_and_grad(loss)(p, x, y, memory=memory))
    (value, direction), new = step(params, X, y, memory)
    assert_close(value, loss(params, X, y))
    return direction, memory, new


def forward(params, x):
    h = [x, np.tanh(x @ params[0])]
    h.append(np.tanh(h[1] @ params[1]))
    return [*h, h[2] @ params[2]]


def test_greedy_layers_learn_their_heads_losses(x64):
    direction, memory, new = run(learning.greedy(LAYERS, criterion, 3, rate=0.3))
    h = forward(PARAMS, X)
    for i in range(2):
        v, c = (np.array(memory[i][k]) for k in ("kernel", "bias"))
        error = (h[i + 1] @ v + c - Y) / 7
        assert_close(direction[i], h[i].T @ ((error @ v.T) * (1 - h[i + 1] ** 2)))
        learned = {"kernel": v - 0.3 * h[i + 1].T @ error, "bias": c - 0.3 * error.sum(0)}
        assert_close(new[i], learned)
    assert_close(direction[2], h[2].T @ (h[3] - Y) / 7)


def test_forward_forward_tells_right_data_from_wrong(x64):
    classes, theta = 3, 0.7
    layers = [lambda p, h: jax.nn.relu(h @ p)] * 2
    labels = jnp.arange(7) % classes
    method = learning.forward_forward(layers, classes, threshold=theta)

    def accuracy(params, x, y):
        scores = learning.forward_forward_scores(layers, params, x, classes)
        return jnp.mean((jnp.argmax(scores, -1) == y).astype(float))

    params = PARAMS[:2]
    direction, memory, new = run(method, params=params, loss=accuracy, y=labels)
    key, now = jax.random.split(memory)
    assert new == key
    wrong = (labels + jax.random.randint(now, (7,), 1, classes)) % classes
    assert not np.any(wrong == labels)

    def unit(h):
        return h / (np.sqrt(np.mean(h**2, axis=-1, keepdims=True)) + 1e-4)

    def with_label(y):
        return np.concatenate([np.eye(classes)[y], X[:, classes:]], 1)

    pair = [with_label(labels), with_label(wrong)]
    for d, p in zip(direction, params):
        total, pair = 0.0, [*map(unit, pair)]
        outs = [np.maximum(h @ p, 0) for h in pair]
        for h, out, sign in zip(pair, outs, (-1, 1)):
            over = np.sum(out**2, -1) - theta * out.shape[1]
            slope = sign / (1 + np.exp(-sign * over))  # of softplus(± (G − θ n))
            total = total + h.T @ (slope[:, None] * 2 * out) / 7
        assert_close(d, total)
        pair = outs
    scores = learning.forward_forward_scores(layers, params, X, classes)
    for label in range(classes):
        h = np.maximum(unit(with_label(np.full(7, label))) @ params[0], 0)
        h = np.maximum(unit(h) @ params[1], 0)  # the first layer's goodness is left out
        assert_close(scores[:, label], np.mean(h**2, -1))


def test_pepita_is_the_papers_formula(x64):
    direction, feedback, _ = run(learning.pepita(LAYERS, criterion, scale=0.5))
    assert np.max(np.abs(feedback)) < 0.5
    assert feedback.shape == (3, 6)
    h = forward(PARAMS, X)
    error = h[3] - Y
    pushed = forward(PARAMS, X + error @ np.array(feedback))
    for i in range(2):
        assert_close(direction[i], pushed[i].T @ (h[i + 1] - pushed[i + 1]) / 7)
    assert_close(direction[2], pushed[2].T @ error / 7)


def test_difference_target_propagation_is_the_papers_formula(x64):
    step, rate, noise = 0.3, 0.2, 0.1
    method = learning.difference_target_propagation(
        LAYERS, criterion, step=step, rate=rate, noise=noise
    )
    direction, memory, new = run(method)
    h, (g,) = forward(PARAMS, X), memory["inverses"]
    v, c = np.array(g["kernel"]), np.array(g["bias"])
    target = h[2] - step * (h[3] - Y) @ PARAMS[2].T
    below = h[1] + np.tanh(target @ v + c) - np.tanh(h[2] @ v + c)
    for i, t in ((1, target), (0, below)):
        assert_close(direction[i], h[i].T @ ((h[i + 1] - t) * (1 - h[i + 1] ** 2)) / step / 7)
    assert_close(direction[2], h[2].T @ (h[3] - Y) / 7)
    keys = jax.random.split(memory["key"], 4)
    noisy = h[1] + noise * np.array(jax.random.normal(keys[2], h[1].shape))
    above = np.tanh(noisy @ PARAMS[1])
    back = np.tanh(above @ v + c)
    delta = 2 * (back - noisy) * (1 - back**2) / 7
    assert_close(new["inverses"], [{"kernel": v - rate * above.T @ delta,
                                    "bias": c - rate * delta.sum(0)}])


@pytest.mark.parametrize("direct", [True, False])
def test_difference_reconstruction_is_the_papers_formula(x64, direct):
    step, rate, noise, damping = 0.3, 0.2, 0.1, 0.7
    direction, memory, new = run(learning.difference_reconstruction(
        LAYERS, criterion, direct=direct, step=step, rate=rate, noise=noise, damping=damping
    ))
    h, feedback = forward(PARAMS, X), jax.tree.map(np.array, memory["feedback"])
    v, c = ([f[k] for f in feedback] if k in feedback[0] else None for k in ("kernel", "bias"))
    slopes = [None, 1 - h[1] ** 2, 1 - h[2] ** 2]

    def sent(out, layer):
        """The target of a layer's result, 1 or 2, and what its feedback reads for it."""
        if direct:
            return h[layer] + (out - h[3]) @ v[layer - 1], None
        above, was = out, h[3]
        for i in range(2, layer - 1, -1):
            read, before = above, was
            above = h[i] + np.tanh(read @ v[i - 1] + c[i - 1]) - np.tanh(was @ v[i - 1] + c[i - 1])
            was = h[i]
        return above, (read, before)

    for i in (1, 2):
        target, _ = sent(h[3] - step * (h[3] - Y), i)
        assert_close(direction[i - 1], h[i - 1].T @ ((h[i] - target) * slopes[i]) / step / 7)
    assert_close(direction[2], h[2].T @ (h[3] - Y) / 7)
    keys = jax.random.split(memory["key"], 4)
    assert new["key"] == keys[0]
    for i in (1, 2):
        one, other = jax.random.split(keys[i])
        near = h[i] + noise * np.array(jax.random.normal(one, h[i].shape))
        out = (np.tanh(near @ PARAMS[1]) if i == 1 else near) @ PARAMS[2]
        moved = h[3] + noise * np.array(jax.random.normal(other, h[3].shape))
        dv, dc = 0.0, 0.0
        for u, wanted, weight in ((out, near, 1.0), (moved, h[i], damping)):
            target, read = sent(u, i)
            off = 2 * weight * (target - wanted) / noise**2 / 7
            if direct:
                dv = dv + (u - h[3]).T @ off
                continue
            for r, sign in zip(read, (1, -1)):
                back = sign * off * (1 - np.tanh(r @ v[i - 1] + c[i - 1]) ** 2)
                dv, dc = dv + r.T @ back, dc + back.sum(0)
        expected = {"kernel": v[i - 1] - rate * dv}
        if not direct:
            expected["bias"] = c[i - 1] - rate * dc
        assert_close(new["feedback"][i - 1], expected)


def test_difference_reconstruction_comes_to_rest_at_damped_gauss_newton_targets(x64):
    """Of linear layers, V = (JJᵀ + λ)⁻¹ J: there the mean step over noise is 0."""
    layers, damping = [lambda p, h: h @ p] * 3, 0.7
    jacobians = [(PARAMS[1] @ PARAMS[2]).T, PARAMS[2].T]
    at_rest = [np.linalg.solve(j @ j.T + damping * np.eye(3), j) for j in jacobians]

    def linear(params, x, y):
        return criterion(x @ params[0] @ params[1] @ params[2], y)

    method = learning.difference_reconstruction(layers, criterion, rate=1.0, damping=damping)

    @jax.jit
    @jax.vmap
    def moved(key):
        memory = {"feedback": [{"kernel": v} for v in at_rest], "key": key}
        _, new = method.value_and_grad(linear)(PARAMS, X, Y, memory=memory)
        return [new["feedback"][i]["kernel"] - v for i, v in enumerate(at_rest)]

    for step in moved(jax.random.split(KEY, 1000)):
        error = np.std(step, 0) / np.sqrt(1000)
        assert np.all(np.abs(np.mean(step, 0)) < 5 * error)
        assert np.max(error) < 0.1


def test_predictive_coding_settles_as_the_paper_says(x64):
    steps, rate, beta = 3, 0.2, 0.7
    direction, *_ = run(learning.predictive_coding(
        LAYERS, criterion, steps=steps, rate=rate, strength=beta
    ))
    h = forward(PARAMS, X)[:3]
    for _ in range(steps):
        f = [np.tanh(h[0] @ PARAMS[0]), np.tanh(h[1] @ PARAMS[1])]
        e = [h[1] - f[0], h[2] - f[1]]
        d1 = e[0] - (e[1] * (1 - f[1] ** 2)) @ PARAMS[1].T
        d2 = e[1] + beta * (h[2] @ PARAMS[2] - Y) @ PARAMS[2].T
        h = [X, h[1] - rate * d1, h[2] - rate * d2]
    f = [np.tanh(h[0] @ PARAMS[0]), np.tanh(h[1] @ PARAMS[1])]
    for i in range(2):
        assert_close(direction[i], -h[i].T @ ((h[i + 1] - f[i]) * (1 - f[i] ** 2)) / beta / 7)
    assert_close(direction[2], h[2].T @ (h[2] @ PARAMS[2] - Y) / 7)


def test_predictive_coding_is_backpropagation_in_its_limit(x64):
    gradient, errors = fbprop.grad(loss)(PARAMS, X, Y), []
    for beta in (1e-3, 1e-4, 1e-5):
        direction, *_ = run(learning.predictive_coding(
            LAYERS, criterion, steps=300, rate=0.2, strength=beta
        ))
        errors.append(max(np.max(np.abs(d - g)) for d, g in zip(direction, gradient)))
    assert errors[2] < 1e-4 * max(np.max(np.abs(g)) for g in gradient)
    np.testing.assert_allclose(np.array(errors[:2]) / errors[1:], 10, rtol=0.3)


def test_equilibrium_propagation_is_the_gradient_at_rest(x64):
    """Of a network with connections both ways; the error falls as β²."""
    params = {"in": PARAMS[0] / 4, "hidden": PARAMS[1] / 4}

    def energy(p, s, x):
        hidden, out = s
        pull = jnp.sum(jnp.tanh(hidden) * (x @ p["in"])) + jnp.sum(
            jnp.tanh(hidden) @ p["hidden"] * jnp.tanh(out))
        return 0.5 * (jnp.sum(hidden**2) + jnp.sum(out**2)) - pull

    def cost(s, y):
        return jnp.mean(jnp.sum((s[1][:, :3] - y) ** 2, -1)) / 2

    def states(x):
        return jnp.zeros((7, 5)), jnp.zeros((7, 4))

    def at_rest(params, x, y):
        return cost(learning.settle(energy, params, states(x), x, steps=400), y)

    gradient = fbprop.grad(at_rest)(params, X, Y)
    errors = []
    for beta in (0.03, 0.003):
        method = learning.equilibrium_propagation(
            energy, cost, states, strength=beta, steps=(400, 400)
        )
        direction, *_ = run(method, params=params, loss=at_rest)
        errors.append(max(np.max(np.abs(direction[k] - gradient[k])) for k in params))
    assert errors[1] < 1e-5
    np.testing.assert_allclose(errors[0] / errors[1], 100, rtol=0.2)


def test_a_batch_is_split_as_asked_and_trains(x64):
    from fbprop import optim, train

    method = learning.greedy(LAYERS, criterion, 3, split=lambda batch, *_: (batch["x"], batch["y"]))
    of_batch = lambda params, batch, key: loss(params, batch["x"], batch["y"])
    optimizer, batch = optim.sgd(0.1), {"x": X, "y": Y}
    memory = method.init(KEY, of_batch, PARAMS, batch, KEY)
    state = train.init(PARAMS, optimizer, learning=memory)
    step = train.step(of_batch, optimizer, learning=method)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    pair = learning.pepita(LAYERS, criterion)
    pair.init(KEY, lambda p, batch: loss(p, *batch), PARAMS, (X, Y))


def test_errors():
    with pytest.raises(TypeError, match=r"list of functions \(params, h\) -> h, got \[\]"):
        learning.greedy([], criterion, 3)
    method = learning.greedy(LAYERS, criterion, 3)
    with pytest.raises(ValueError, match="one part per layer, got list of 2 expected 3"):
        method.init(KEY, loss, PARAMS[:2], X, Y)
    with pytest.raises(ValueError, match="inputs and targets, got a loss of 1 arguments"):
        method.init(KEY, loss, PARAMS, X)
    with pytest.raises(ValueError, match="States settle in steps of some size, got steps=0"):
        learning.predictive_coding(LAYERS, criterion, steps=0)
    with pytest.raises(ValueError, match="a step away, got step=0"):
        learning.difference_target_propagation(LAYERS, criterion, step=0)
    with pytest.raises(ValueError, match="noise of some size, got noise=0, damping=0.1"):
        learning.difference_reconstruction(LAYERS, criterion, noise=0)
    with pytest.raises(ValueError, match=r"first numbers, got inputs \[7, 2\] expected"):
        learning.forward_forward_scores(LAYERS, PARAMS, X[:, :2], 3)
    two = [lambda p, h: jnp.tanh(h @ p) @ p.T, lambda p, h: h @ p]
    method = learning.pepita(two, criterion)
    params, x, y = [jnp.ones((3, 4)), jnp.ones((3, 2))], jnp.ones((5, 3)), jnp.ones((5, 2))
    memory = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"got products of \[\[5, 4\], \[5, 3\]\] in layer 0"):
        method.value_and_grad(lambda p, x, y: 0.0)(params, x, y, memory=memory)
