"""Per example: norms, clipped sums, moments and cosines are those of every example's own gradient.

The slow exact form is `jax.vmap` of `jax.grad` of the loss of a batch of one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop import ops
from fbprop.watch import per_example

B = 5
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape))


def integers(seed, high, *shape):
    return jax.device_put(np.random.default_rng(seed).integers(0, high, shape))


def dense(p, x, y):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return jnp.mean((h @ p["v"] + p["c"] - y) ** 2)


def over_time(p, x, y):
    """Twelve places: inner products of factors for the small weight, arrays for the others."""
    h = jnp.einsum("btd,dhk->bhtk", x, p["w"])
    return jnp.mean((jnp.einsum("bhtk,hkd->btd", jnp.tanh(h), p["o"]) @ p["v"] - y) ** 2)


def convolutions(p, x, y):
    x = lax.conv_general_dilated(
        x, p["k"], (2, 1), ((1, 0), (1, 1)), dimension_numbers=("NCHW", "HWIO", "NHWC")
    )
    x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    for kernel, groups in (("point", 1), ("each", 6)):
        x = lax.conv_general_dilated(
            x, p[kernel], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    return jnp.mean((x.reshape(len(x), -1) @ p["w"] - y) ** 2)


def log_likelihood(logits, y):
    return jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1))


def transformer(p, tokens):
    """Embeddings, layer norm, attention, RMS norm, tied head; a cosine penalty on the side."""
    x = p["e"][tokens[:, :-1]] + p["pos"]
    n = (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 0.1)
    q, k, v = jnp.split((n * p["scale"] + p["shift"]) @ p["qkv"], 3, -1)
    x = x + jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v @ p["out"]
    x = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1) * p["rms"]
    return -log_likelihood(x @ p["e"].T, tokens[:, 1:])


def lstm(p, x, y):
    def step(carry, x):
        c, h = carry
        i, f, g, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    zeros = jnp.zeros((len(x), 3))
    out = lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))[1]
    return jnp.mean((jnp.swapaxes(out, 0, 1) - y) ** 2)


def gru(p, tokens):
    """The table is looked up inside the loop, and the reset gate's product used twice."""
    def step(h, i):
        x = p["e"][i]
        z = jax.nn.sigmoid(x @ p["z"] + h @ p["u"])
        h = z * h + (1 - z) * jnp.tanh(x @ p["c"] + (h @ p["u"]) * z)
        return h, log_likelihood(h @ p["out"], i)

    return -jnp.mean(lax.scan(step, jnp.zeros((len(tokens), 3)), tokens.T)[1])


def by_ops(p, x, tokens):
    h = ops.lstm(ops.dense(x, p["in"], activation="gelu"), p["wx"], p["wh"])[0]
    return ops.linear_cross_entropy(h, p["out"], tokens)


def shared(p, x, y):
    """One weight used three times, once transposed, in rematerialised code."""
    f = jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]))
    return jnp.mean((f(f(x)) @ p["w"].T - y) ** 2)


def plain(p, x, y):
    """A product of parameters, a reshaped one, a branch, a loop, a penalty, an unused parameter."""
    w = p["a"] @ p["b"]
    h = lax.cond(jnp.sum(p["a"]) > 0, jnp.sin, jnp.cos, x @ w)
    h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h * p["s"]), h)
    return jnp.mean((h @ p["c"].reshape(2, 3).T - x @ p["a"]) ** 2) + 0.1 * jnp.sum(p["c"] ** 2)


def keyed(p, x, keys):
    """Dropout by a key per example, and a mean over each example's own mask."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(keys)
    h = jnp.where(keep, x @ p["w"], 0.0)
    return jnp.mean(jnp.sum(h**2, 1) / (1.0 + jnp.sum(keep, 1, dtype=h.dtype)))


def picked(p, x, labels):
    """Labels picked by place in the batch, and by a one-hot code."""
    scores = jax.nn.log_softmax(x @ p["w"])
    return jnp.mean(scores[jnp.arange(len(x)), labels]) - jnp.mean(
        jnp.sum(scores * jax.nn.one_hot(labels, 3, dtype=scores.dtype), -1)**2
    )


def cases():
    n = normal
    layers = {"w": n(0, 7, 3), "b": n(1, 3), "v": n(2, 3, 2), "c": n(3, 2)}
    yield dense, layers, (n(4, B, 7), n(5, B, 2))
    heads = {"w": n(0, 7, 2, 3), "o": n(1, 2, 3, 5), "v": n(2, 5, 37)}
    yield over_time, heads, (n(3, B, 3, 7), n(4, B, 3, 37))
    kernels = {"k": n(0, 3, 3, 2, 3), "point": n(1, 1, 1, 3, 6), "each": n(2, 2, 2, 1, 6),
               "w": n(3, 18, 2)}
    yield convolutions, kernels, (n(4, B, 2, 7, 7), n(5, B, 2))
    block = {"e": n(0, 11, 4), "pos": n(1, 6, 4), "scale": n(2, 4), "shift": n(3, 4),
             "qkv": n(4, 4, 12), "out": n(5, 4, 4), "rms": n(6, 4)}
    yield transformer, block, (integers(7, 11, B, 7),)
    cell = {"wx": n(0, 2, 12), "wh": n(1, 3, 12), "b": n(2, 12)}
    yield lstm, cell, (n(3, B, 11, 2), n(4, B, 11, 3))
    yield gru, {"e": n(0, 7, 2), "z": n(1, 2, 3), "u": n(2, 3, 3), "c": n(3, 2, 3),
                "out": n(4, 3, 7)}, (integers(5, 7, B, 9),)
    yield by_ops, {"in": n(0, 2, 2), "wx": n(1, 2, 12), "wh": n(2, 3, 12), "out": n(3, 3, 7)}, (
        n(4, B, 5, 2), integers(5, 7, B, 5))
    yield shared, {"w": n(0, 3, 3)}, (n(1, B, 2, 3), n(2, B, 2, 3))
    yield plain, {"a": n(0, 3, 2), "b": n(1, 2, 3), "c": n(2, 6), "s": n(3), "none": n(4, 2)}, (
        n(5, B, 3), n(6, B, 2))
    yield keyed, {"w": n(0, 7, 3)}, (n(1, B, 7), jax.random.split(jax.random.key(0), B))
    yield picked, {"w": n(0, 7, 3)}, (n(1, B, 7), integers(2, 3, B))


def gradients(loss, params, *batch):
    """[B, ...]: the slow exact form."""
    def one(params, *example):
        return loss(params, *jax.tree.map(lambda x: x[None], example))

    return jax.vmap(jax.grad(one), (None, *(0 for _ in batch)))(params, *batch)


def slow(loss, params, *batch):
    """All that there is, from every example's own gradient."""
    found = gradients(loss, params, *batch)
    flat = jnp.concatenate([g.reshape(B, -1) for g in jax.tree.leaves(found)], 1)
    total = jnp.linalg.norm(flat, axis=1)
    each = jax.tree.map(lambda g: jnp.linalg.norm(g.reshape(B, -1), axis=1), found)
    scale = jnp.minimum(1, jnp.mean(total) / total)
    mean = jax.tree.map(lambda g: jnp.mean(g, 0), found)
    trace = jnp.sum(jnp.var(flat, 0, ddof=1))
    length = jnp.sum(jnp.mean(flat, 0) ** 2) - trace / B
    unit = flat / total[:, None]
    return {
        "norms": total, "each": each, "mean": mean, "noise_scale": trace / length,
        "clipped": jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), found),
        "variance": jax.tree.map(lambda g: jnp.var(g, 0, ddof=1), found),
        "cosines": unit @ unit.T, "value": loss(params, *batch),
    }


SUMS = dense, convolutions, transformer  # of which second moments are tested too


def fast(loss, params, *batch):
    norms = per_example.norms(loss)(params, *batch)
    clipped = per_example.clipped_sum(loss, jnp.mean(norms.total))(params, *batch)
    found = {"norms": norms.total, "each": norms.each, "value": jnp.mean(norms.values),
             "clipped": clipped.gradient}
    if loss not in SUMS:
        return found
    moments = per_example.moments(loss)(params, *batch)
    return found | {
        "mean": moments.mean, "noise_scale": moments.noise_scale, "variance": moments.variance,
        "cosines": per_example.cosines(loss)(params, *batch),
    }


def assert_close(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, **(tolerance or CLOSE), err_msg=jax.tree_util.keystr(path))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", [c.__name__ for c in (
    dense, over_time, convolutions, transformer, lstm, gru, by_ops, shared, plain, keyed, picked)])
def test_as_of_every_examples_own_gradient(loss):
    loss, params, batch = next(c for c in cases() if c[0].__name__ == loss)
    # Of no arguments, so that XLA computes it while it compiles: see test_rules.py.
    found, expected = jax.jit(lambda: [by(loss, params, *batch) for by in (fast, slow)])()
    assert_close(found, {name: expected[name] for name in found})


WAYS = {
    dense: {"['b']": "its own", "['w']": "norms of two", "['v']": "norms of two"},
    over_time: {"['w']": "inner products of factors", "['v']": "inner products of factors"},
    convolutions: {"['k']": "array of one", "['w']": "norms of two"},
    transformer: {"['e']": "inner products of rows; ", "['qkv']": "array of one"},
    by_ops: {"['in']": "array of one", "['wx']": "array of one", "['out']": "array of one"},
    lstm: {"['wx']": "array of one", "['b']": "its own"},
    plain: {"['a']": "its own", "['c']": "its own", "['none']": "it is 0"},
}


@pytest.mark.parametrize("loss", WAYS, ids=lambda loss: loss.__name__)
def test_explain_says_of_what_norms_are_made(loss):
    _, params, batch = next(c for c in cases() if c[0] is loss)
    said = per_example.explain(loss)(params, *batch)
    assert [x.path for x in said.lines] == [
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)
    ]
    for line in said.lines:
        assert WAYS[loss].get(line.path, "") in line.formulation
        assert f"{line.path} " in str(said)
        assert line.formulation in str(said)


@pytest.mark.usefixtures("x64")
def test_under_vmap_scan_and_in_parts():
    loss, params, batch = next(cases())
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)

    @jax.jit
    def ways(params, several, batch):
        def of(params, at_once=None):
            return per_example.norms(loss, at_once=at_once)(params, *batch).total

        def clipped(at_once):
            found = per_example.clipped_sum(loss, 1.0, at_once=at_once)(params, *batch)
            return found.gradient, found.norms

        step = lambda _, params: (None, of(params))
        return (
            of(params), of(params, 1), jax.vmap(of)(several), lax.scan(step, None, several)[1],
            clipped(1), clipped(5), jax.grad(lambda p: jnp.sum(of(p) ** 2))(params),
            jax.grad(lambda p: jnp.sum(slow(loss, p, *batch)["norms"] ** 2))(params),
            slow(loss, params, *batch)["norms"],
        )

    whole, parts, under_vmap, in_scan, one, all_at_once, ours, jaxs, expected = ways(
        params, several, batch
    )
    for found in (whole, parts, under_vmap[0], in_scan[0]):
        np.testing.assert_allclose(found, expected, **CLOSE)
    np.testing.assert_allclose(under_vmap[1], in_scan[1], **CLOSE)
    assert_close(one, all_at_once)
    assert_close(ours, jaxs)


def test_sharded_over_eight_devices():
    loss, params, _ = next(cases())
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    x, y = (normal(i, 16, n).astype(jnp.float32) for i, n in ((0, 7), (1, 2)))
    run = jax.jit(lambda p, x, y: per_example.clipped_sum(loss, 1.0, at_once=2)(p, x, y))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    found = run(params, *jax.device_put((x, y), shards))
    assert found.norms.sharding.is_equivalent_to(shards, 1)
    assert_close(found, run(params, x, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_other_types(dtype):
    """Norms of 16-bit gradients are summed in float32."""
    _, params, batch = next(cases())
    cast = jax.tree.map(lambda x: x.astype(dtype), (params, *batch))
    total = jax.jit(per_example.norms(dense))(*cast).total
    assert total.dtype == jnp.float32
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    expected = jax.jit(lambda *args: slow(dense, *args)["norms"])(params, *batch)
    np.testing.assert_allclose(total, expected, rtol=tolerance)


def test_a_batch_of_none_and_of_one():
    _, params, (x, y) = next(cases())
    found = jax.jit(per_example.clipped_sum(dense, 1.0))(params, x[:0], y[:0])
    assert found.norms.shape == (0,)
    assert all(not jnp.any(g) for g in jax.tree.leaves(found.gradient))
    moments = jax.jit(per_example.moments(dense))(params, x[:1], y[:1])
    assert all(jnp.all(jnp.isnan(v)) for v in jax.tree.leaves(moments.variance))


def test_noise_has_the_deviation_asked_for():
    def loss(w, x):
        return jnp.mean(x) + 0 * jnp.sum(w)

    draw = per_example.clipped_sum(loss, 3.0, noise=2.0)
    noisy = draw(jnp.zeros(10_000), jnp.ones(2), key=jax.random.key(0)).gradient
    assert abs(float(jnp.std(noisy)) - 6) < 0.2
    assert abs(float(jnp.mean(noisy))) < 0.3


def test_a_gradient_of_zero_is_not_scaled():
    clipped = per_example.clipped_sum(lambda w, x: jnp.mean(x @ w), 1.0)
    assert clipped(jnp.ones(2), jnp.zeros((3, 2))).gradient.tolist() == [0, 0]


X, Y = np.ones((3, 2), "float32"), np.ones(3, "float32")
W = jnp.ones((2, 2))


def mixes(w, x, y):
    h = x @ w
    return jnp.mean((h - jnp.mean(h, 0)) ** 2)


MEETING = {
    "a statistic of the batch in 'sub'": mixes,
    "a statistic of the batch in 'sqrt'": lambda w, x, y: jnp.sqrt(jnp.mean((x @ w) ** 2)),
    "a statistic of the batch in 'div'": lambda w, x, y: jnp.sum(x @ w) / jnp.sum(y),
    "a statistic of the batch in 'mul'": lambda w, x, y: jnp.sum(x @ w) * jnp.sum(y),
    "comparison or product of examples in 'reduce_max'": lambda w, x, y: jnp.max(x @ w),
    "comparison or product of examples in 'cumsum'": lambda w, x, y: jnp.mean(
        jnp.cumsum(x @ w, 0)),
    "comparison or product of examples in 'sort'": lambda w, x, y: jnp.mean(jnp.sort(x @ w, 0)[0]),
    "products of pairs": lambda w, x, y: jnp.mean((x @ w) @ x.T),
    "random numbers for the whole batch": lambda w, x, y: jnp.mean(
        (x @ w) * jax.random.normal(jax.random.key(0), x.shape)),
    "place in the batch": lambda w, x, y: jnp.mean((x @ w)[:, 0] * jnp.arange(len(x)).astype("f")),
    "picked out of the batch": lambda w, x, y: jnp.mean((x @ w)[y.astype(int)]),
    "some of the batch's examples": lambda w, x, y: jnp.mean((x @ w)[:1]),
    "a loop over examples": lambda w, x, y: jnp.mean(
        lax.scan(lambda c, x: (c + x @ w, None), jnp.zeros(2), x)[0]),
    "a statistic of the batch in 'gt'": lambda w, x, y: lax.cond(
        jnp.sum(y) > 0, lambda: jnp.mean(x @ w), lambda: 0.0),
    "a statistic of the batch in 'lt'": lambda w, x, y: jnp.mean(lax.while_loop(
        lambda h: jnp.sum(h) < 9, lambda h: h * 2, x @ w)),
    "a matrix of examples": lambda w, x, y: jnp.mean(jnp.linalg.svd(x @ w, full_matrices=False)[1]),
    "a window over examples": lambda w, x, y: jnp.mean(lax.reduce_window(
        x @ w, 0.0, lax.add, (2, 1), (1, 1), "SAME")),
    "a convolution over examples": lambda w, x, y: jnp.mean(jnp.convolve((x @ w)[:, 0], w[0])),
}


@pytest.mark.parametrize("what", MEETING)
def test_examples_that_meet_are_refused(what):
    with pytest.raises(ValueError, match=f"Examples of a batch do not meet.*{what}.*test_per_ex"):
        per_example.norms(MEETING[what])(W, X, Y)


def test_a_path_says_where_examples_meet():
    def loss(w, x, y):
        with jax.named_scope("norm"):
            return mixes(w, x, y)

    with pytest.raises(ValueError, match="path 'norm'"):
        per_example.norms(loss)(W, X, Y)


@pytest.mark.parametrize(("args", "error", "what"), [
    ((W, X, Y[:2]), ValueError, "first dimension numbers its examples, got the shapes"),
    ((W, X, np.float32(1)), ValueError, "first dimension numbers its examples"),
    ((np.ones((2, 2), int), X, Y), TypeError, "grad requires real- or complex-valued inputs"),
])
def test_bad_arguments(args, error, what):
    with pytest.raises(error, match=what):
        per_example.norms(lambda w, x, y: jnp.mean(x @ w))(*args)


def test_bad_losses():
    with pytest.raises(TypeError, match="What is differentiated is a function"):
        per_example.norms(3)(W, X)
    with pytest.raises(TypeError, match="only defined for scalar-output"):
        per_example.norms(lambda w, x: x @ w)(W, X)
    with pytest.raises(ValueError, match="A loss takes batches of any size, got one that fails"):
        per_example.norms(lambda w, x: jnp.mean((x * Y[:, None]) @ w))(W, X)
    with pytest.raises(ValueError, match="The bound on a norm is positive, got 0"):
        per_example.clipped_sum(mixes, 0)
    with pytest.raises(ValueError, match="Noise is a standard deviation"):
        per_example.clipped_sum(mixes, 1, noise=-1)
    with pytest.raises(ValueError, match="Noise is drawn with a key"):
        per_example.clipped_sum(lambda w, x: jnp.mean(x @ w), 1, noise=1)(W, X)
    with pytest.raises(ValueError, match="Examples at once divide the batch, got at_once=2"):
        per_example.norms(lambda w, x: jnp.mean(x @ w), at_once=2)(W, X)


def test_aux_and_rules():
    doubled = fbprop.rule("tanh", "twice too much", x=lambda dy, out: 2 * dy * (1 - out * out))

    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w)), x

    found = [per_example.norms(loss, has_aux=True, rules=rules)(W, X).total
             for rules in (None, fbprop.table.override(doubled))]
    np.testing.assert_allclose(2 * found[0], found[1], rtol=1e-6)
