"""`ops.lstm`, `ops.gru`, `ops.rnn`: both directions, padding, ends, types, what is kept, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fbprop
from fbprop import ops
from fbprop.ops import recurrent

B, T, D, H = 3, 16, 2, 4
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def drawn(*shape, seed=0, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(values.astype(jnp.dtype(dtype)))


def weights(name, front=(), dtype="float32"):
    shapes = [(D, GATES[name] * H), (H, GATES[name] * H), (GATES[name] * H,)]
    shapes += [(H,)] if name == "gru" else []
    return [drawn(*front, *s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]


def states(name, front=()):
    each = [drawn(*front, B, H, seed=7 + i) for i in range(2 if name == "lstm" else 1)]
    return tuple(each) if name == "lstm" else each[0]


@pytest.mark.parametrize("name", GATES)
def test_by_chunks_is_the_plain_loop(name, x64):
    """Sixteen steps, two chunks: rows of the rules' tests have one."""
    operation = getattr(recurrent, f"_{name}")
    static = {"activation": "relu"} if name == "rnn" else {}
    operands = [drawn(B, T, D), *weights(name), *jax.tree.leaves(states(name))]
    operands = [a.astype("float64") for a in operands]
    lengths = jnp.array([T, 5, 0], jnp.int32)

    def both(f, vjp):
        def run(*operands):
            y, pullback = vjp(lambda *a: f(*a, lengths, **static), *operands)
            return y, pullback(jax.tree.map(jnp.sin, y))

        return jax.jit(run)(*operands)

    found, expected = both(operation, fbprop.vjp), both(operation.reference, jax.vjp)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", GATES)
def test_directions_and_padding(name):
    """Reversed is of the reversed sequence; padding may hold nan; both directions side by side."""
    run, lengths, own = getattr(ops, name), jnp.array([T, 5, 0]), weights(name, (2,))
    real = (jnp.arange(T) < lengths[:, None])[..., None]
    x = jnp.where(real, drawn(B, T, D), jnp.nan)
    one = [[a[i] for a in own] for i in range(2)]
    start = states(name, (2,))
    each = [jax.tree.map(lambda s, i=i: s[i], start) for i in range(2)]

    @jax.jit
    def all_of(x):
        turned = jnp.stack([jnp.concatenate([s[:n][::-1], s[n:]]) for s, n in zip(x, (T, 5, 0))])
        return (run(x, *own, initial=start, lengths=lengths, bidirectional=True),
                run(x, *one[0], initial=each[0], lengths=lengths),
                run(x, *one[1], initial=each[1], lengths=lengths.at[0].add(2), reverse=True),
                run(turned, *one[1], initial=each[1], lengths=lengths),
                run(x[:, :5], *one[0], initial=each[0]))

    (y, state), (there, ahead), (back, behind), (turned, other), (short, _) = all_of(x)
    np.testing.assert_array_equal(y, jnp.concatenate([there, back], -1))
    for a, b, c in zip(*map(jax.tree.leaves, (state, ahead, behind))):
        np.testing.assert_array_equal(a, jnp.stack([b, c]))
    np.testing.assert_allclose(back[0], turned[0, ::-1], rtol=1e-6)
    np.testing.assert_allclose(back[1, :5], turned[1, 4::-1], rtol=1e-6)
    for a, b, s in zip(*map(jax.tree.leaves, (behind, other, each[1]))):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        np.testing.assert_array_equal(a[2], s[2])  # no step is real
    np.testing.assert_allclose(there[1, :5], short[1], rtol=1e-6)
    assert not there[1, 5:].any()
    assert not there[2].any()


def test_at_the_ends():
    """One step, none, no rows; large and infinite inputs; padding that holds nan."""
    own = weights("lstm")

    def loss(x, own, initial=None, lengths=None):
        y, (h, c) = ops.lstm(x, *own, initial=initial, lengths=lengths)
        return jnp.sum(jnp.sin(y)) + jnp.sum(h * h) + jnp.sum(jnp.cos(c)), y

    both = jax.jit(fbprop.value_and_grad(loss, (0, 1), has_aux=True))
    (_, y), dins = both(drawn(B, 1, D), own)
    i, _, g, o = np.split(drawn(B, 1, D)[:, 0] @ own[0] + own[2], 4, -1)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    expected = sigmoid(o) * np.tanh(sigmoid(i) * np.tanh(g))
    np.testing.assert_allclose(y[:, 0], expected, rtol=1e-5)
    assert not dins[1][1].any()  # of U: h was 0
    for x in (jnp.zeros((B, 0, D)), jnp.zeros((0, 5, D))):
        (value, y), dins = both(x, own, None)
        assert y.shape == (*x.shape[:2], H)
        assert value == (B * H if x.shape[0] else 0)
        assert not any(d.any() for d in dins[1])
    start = jnp.ones((B, H)), jnp.ones((B, H))
    gradient = jax.jit(fbprop.grad(lambda s: loss(jnp.zeros((B, 0, D)), own, s)[0]))(start)
    np.testing.assert_allclose(gradient[0], 2)
    np.testing.assert_allclose(gradient[1], -jnp.sin(1), rtol=1e-6)
    (_, y), dins = both(1e4 * drawn(B, 5, D), own)  # open or shut
    assert jnp.isfinite(y).all()
    assert all(jnp.isfinite(d).all() for d in jax.tree.leaves(dins))
    assert jnp.isfinite(both(drawn(B, 5, D).at[0, 3, 0].set(jnp.inf), own)[0][1]).all()
    lengths = jnp.array([5, 2, 0])
    real = (jnp.arange(5) < lengths[:, None])[..., None]
    (_, y), dins = both(drawn(B, 5, D), own, None, lengths)
    (_, same), padded = both(jnp.where(real, drawn(B, 5, D), jnp.nan), own, None, lengths)
    for a, b in zip(jax.tree.leaves((y, dins)), jax.tree.leaves((same, padded))):
        np.testing.assert_array_equal(a, b)
    assert not jnp.where(real, 0, dins[0]).any()


@pytest.mark.parametrize(("name", "dtype"), [
    ("lstm", "bfloat16"), ("gru", "bfloat16"), ("rnn", "float16")])
def test_16_bit_with_states_in_float32(name, dtype):
    def run(dtype):
        operands = [drawn(B, T, D, dtype=dtype), *weights(name, dtype=dtype)]
        operands = [a if a.dtype == dtype else a.astype(dtype) for a in operands]
        y, pullback = jax.jit(lambda *a: fbprop.vjp(getattr(ops, name), *a))(*operands)
        return y, pullback(jax.tree.map(jnp.ones_like, y))

    (y, state), dins = run(dtype)
    wide = run("float32")
    assert y.dtype == dtype
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(state))
    assert all(d.dtype == dtype for d in dins)
    off = 2e-2 if dtype == "bfloat16" else 4e-3
    for a, b in zip(jax.tree.leaves((y, state, dins)), jax.tree.leaves(wide)):
        np.testing.assert_allclose(a, b, rtol=0, atol=off * float(jnp.max(jnp.abs(b))))


def test_keeps_what_its_docstring_says():
    x = drawn(B, T, D)
    for name, gates in (("lstm", 5), ("gru", 4), ("rnn", 0)):
        own = weights(name)
        found = fbprop.explain(lambda x, *own, f=getattr(ops, name): f(x, *own)[0], x, *own)
        kept = x.size + own[0].size + own[1].size + B * T * H * (1 + gates)
        assert found.kept == 4 * kept
        assert "cotangents of 8 steps at once" in str(found)


def on_devices(k, x):
    """A loss by operations that multiply by weights, or have loops."""
    labels = jnp.ones((len(x), 5), jnp.int32)
    outs = [
        ops.lstm(x, k, k[:2], k[0])[0],
        ops.ctc_loss(x @ k, labels[:, :2]),
        ops.rms_norm(x, k[:, 0]),
        ops.dense(x, k, k[0], activation="silu"),
        ops.linear_cross_entropy(x, k, labels, reduction="none"),
        ops.attention(*([(x @ k)[:, :, None]] * 3), scale=1.0),
    ]
    return sum(jnp.sum(jnp.sin(y)) for y in outs)


def test_operations_on_several_devices():
    """Weights are the same on all: their cotangents are summed, within `shard_map` and by types."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    x, k = drawn(4, 5, 2), drawn(2, 8, seed=1)
    spread = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    inside = jax.jit(spread(jax.grad(on_devices)))(k, x)
    total = spread(lambda k, x: jax.lax.psum(on_devices(k, x), "d"))
    outside = jax.jit(fbprop.grad(total))(k, x)
    typed = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(typed):
        at = functools.partial(jax.NamedSharding, typed)
        operands = jax.device_put(k, at(P())), jax.device_put(x, at(P("d")))
        explicit = np.asarray(jax.jit(fbprop.grad(on_devices))(*operands))
    expected = jax.jit(jax.grad(on_devices))(k, x)
    for found in (inside, outside, explicit):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


X, (W, U, BIAS) = drawn(B, T, D), weights("lstm")


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: ops.lstm(X[0], W, U), ValueError, r"lstm takes x of shape \[B, T, D\], got \[16, 2\]"),
    (lambda: ops.lstm(X, U, U), ValueError, r"takes kernel of shape \[2, 16\], got \[4, 16\]"),
    (lambda: ops.lstm(X, W, U[:, :8]), ValueError, r"recurrent of shape \[4, 16\], got \[4, 8\]"),
    (lambda: ops.lstm(X, W, U, BIAS[:3]), ValueError, r"takes bias of shape \[16\], got \[3\]"),
    (lambda: ops.lstm(X, W, U, initial=(X[:, 0], X[:, 0])), ValueError,
     r"takes initial h of shape \[3, 4\], got \[3, 2\]"),
    (lambda: ops.lstm(X, W, U, initial=(X,)), ValueError,
     r"lstm starts from \(h, c\), got an initial state of 1 arrays"),
    (lambda: ops.lstm(X, W, U, bidirectional=True), ValueError,
     r"takes kernel of shape \[2, 2, 16\], got \[2, 16\]"),
    (lambda: ops.lstm(X, W, U, lengths=jnp.ones(3)), TypeError, "that are integers, got float32"),
    (lambda: ops.gru(X, W[:, :12], U[:, :12], lengths=jnp.array([1])), ValueError,
     r"gru's lengths are one per example, got shape \(1,\) expected \(3,\)"),
    (lambda: ops.gru(X, W[:, :12], U[:, :12], None, BIAS), ValueError,
     r"takes recurrent_bias of shape \[4\], got \[16\]"),
    (lambda: ops.lstm(X, W.astype("bfloat16"), U), TypeError,
     "multiplies numbers of one dtype, got x float32, kernel bfloat16, recurrent float32"),
    (lambda: ops.lstm(jnp.ones((1, 2, 3), int), W, U), TypeError, "lstm takes floating numbers"),
    (lambda: ops.rnn(X, W[:, :4], U[:, :4], activation="sin"), ValueError,
     "activation is 'tanh' or 'relu', got 'sin'"),
])
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
