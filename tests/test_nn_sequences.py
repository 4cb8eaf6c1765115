"""Recurrent layers, attention and time averages, with and without padding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import nn

KEY = jax.random.key(0)
LENGTHS = np.array([5, 2, 3])


def normal(shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_params(layer, x):
    shapes = jax.eval_shape(layer.init, KEY, x)
    return jax.tree.map(lambda p: normal(p.shape, p.dtype, seed=p.size), shapes)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_by_hand(params, x):
    """All outputs [T, features] of one sequence [T, D]."""
    h = c = np.zeros(params["recurrent"].shape[0])
    outputs = []
    for row in np.asarray(x):
        z = row @ params["kernel"] + h @ params["recurrent"] + params["bias"]
        i, f, g, o = np.split(np.asarray(z), 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


def gru_by_hand(params, x):
    h, outputs = np.zeros(params["recurrent"].shape[0]), []
    w, u, b = (np.split(np.asarray(params[k]), 3, -1) for k in ("kernel", "recurrent", "bias"))
    for row in np.asarray(x):
        r = sigmoid(row @ w[0] + h @ u[0] + b[0])
        z = sigmoid(row @ w[1] + h @ u[1] + b[1])
        n = np.tanh(row @ w[2] + b[2] + r * (h @ u[2] + np.asarray(params["recurrent_bias"])))
        h = (1 - z) * n + z * h
        outputs.append(h)
    return np.stack(outputs)


CELLS = {"lstm": (nn.lstm, lstm_by_hand), "gru": (nn.gru, gru_by_hand)}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_recurrent_layer_equals_its_formula_and_ignores_padding(x64, name, reverse):
    make, by_hand = CELLS[name]
    layer, x = make(7, reverse=reverse, dtype=jnp.float64), normal((3, 5, 2))
    params = random_params(layer, x)
    padded = jnp.where(nn.sequence_mask(jnp.asarray(LENGTHS), 5)[..., None], x, jnp.nan)
    apply = jax.jit(layer.apply)
    whole, y = apply(params, x), apply(params, padded, lengths=jnp.asarray(LENGTHS))
    last = make(7, reverse=reverse, last=True, dtype=jnp.float64)
    state = jax.jit(last.apply)(params, padded, lengths=jnp.asarray(LENGTHS))
    for i, length in enumerate(LENGTHS):
        turn = slice(None, None, -1 if reverse else 1)
        chex.assert_trees_all_close(whole[i], by_hand(params, x[i][turn])[turn], rtol=1e-12)
        expected = by_hand(params, x[i, :length][turn])
        chex.assert_trees_all_close(y[i, :length], expected[turn], rtol=1e-12)
        chex.assert_trees_all_equal(y[i, length:], jnp.zeros((5 - length, 7)))
        chex.assert_trees_all_close(state[i], expected[-1], rtol=1e-12)


def test_recurrent_kernels_start_orthogonal_and_the_forget_gate_open():
    x = jnp.ones((1, 2, 3))
    params = nn.lstm(5).init(KEY, x)
    blocks = np.split(np.asarray(params["recurrent"]), 4, axis=1)
    for block in blocks:
        np.testing.assert_allclose(block.T @ block, np.eye(5), atol=1e-5)
    assert not np.allclose(blocks[0], blocks[1])
    chex.assert_trees_all_equal(params["bias"], jnp.repeat(jnp.array([0.0, 1, 0, 0]), 5))
    assert np.abs(params["kernel"]).max() <= np.sqrt(6 / (3 + 5))  # Glorot's, of each gate
    half = nn.lstm(5, forget_bias=0.5).init(KEY, x)["bias"]
    assert half[5:10].tolist() == [0.5] * 5
    assert jax.tree.map(jnp.shape, nn.gru(5).init(KEY, x)) == {
        "kernel": (3, 15), "recurrent": (5, 15), "bias": (15,), "recurrent_bias": (5,)}


def test_lstm_of_bfloat16_adds_up_its_cell_in_float32():
    params = {"kernel": jnp.zeros((1, 4)), "recurrent": jnp.zeros((1, 4)),
              "bias": jnp.array([-5.5, 12.0, 5.0, 5.0])}  # adds 1/245 a step, forgets 6e-6
    x = jnp.zeros((1, 500, 1))
    wide = nn.lstm(1, last=True).apply(params, x)
    short, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    y = nn.lstm(1, last=True).apply(short, x)
    assert y.dtype == jnp.bfloat16
    # A cell of 8 bits stops growing at 1: tanh 1 = 0.76 in place of tanh 2 = 0.96.
    np.testing.assert_allclose(np.float32(y), wide, rtol=0.01)
    assert wide[0, 0] > 0.9


def test_bidirectional_is_both_directions_side_by_side(x64):
    layer = nn.bidirectional(functools.partial(nn.lstm, 3, dtype=jnp.float64))
    x, lengths = normal((3, 5, 2)), jnp.asarray(LENGTHS)
    params = random_params(layer, x)

    @jax.jit
    def run(params, x):
        there = nn.lstm(3).apply(params["forward"], x, lengths=lengths)
        back = nn.lstm(3, reverse=True).apply(params["backward"], x, lengths=lengths)
        return there, back, layer.apply(params, x, lengths=lengths)

    there, back, y = run(params, x)
    chex.assert_trees_all_close(y, jnp.concatenate([there, back], -1), rtol=1e-12)
    start = layer.init(KEY, x)
    assert not np.array_equal(start["forward"]["kernel"], start["backward"]["kernel"])


def attention_by_hand(params, x, heads, causal):
    """Output [T, D] for one sequence [T, D]."""
    steps, size = x.shape
    project = lambda name, x: x @ np.asarray(params[name]["kernel"]) + np.asarray(
        params[name]["bias"])
    q, k, v = np.split(project("qkv", np.asarray(x)), 3, axis=-1)
    out = np.zeros((steps, size))
    for head in np.split(np.arange(size), heads):
        for t in range(steps):
            seen = range(t + 1 if causal else steps)
            scores = [q[t, head] @ k[s, head] / np.sqrt(len(head)) for s in seen]
            shares = np.exp(scores) / np.sum(np.exp(scores))
            out[t, head] = sum(share * v[s, head] for share, s in zip(shares, seen))
    return project("out", out)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_its_formula_and_ignores_padding(x64, causal):
    layer = nn.attention(2, causal=causal, dtype=jnp.float64)
    x, lengths = normal((3, 5, 6)), jnp.asarray(LENGTHS)
    params = random_params(layer, x)
    apply = jax.jit(layer.apply)
    whole, y = apply(params, x), apply(params, x, lengths=lengths)
    for i, length in enumerate(LENGTHS):
        by_hand = functools.partial(attention_by_hand, params, heads=2, causal=causal)
        chex.assert_trees_all_close(whole[i], by_hand(x[i]), rtol=1e-11)
        chex.assert_trees_all_close(y[i, :length], by_hand(x[i, :length]), rtol=1e-11)
    empty = apply(params, x, lengths=jnp.zeros_like(lengths))
    assert np.isfinite(empty).all()


def test_causal_attention_sees_nothing_later():
    layer, x = nn.attention(3), normal((2, 7, 6), jnp.float32)
    params, apply = random_params(layer, x), jax.jit(layer.apply)
    other = x.at[:, 4:].set(normal((2, 3, 6), jnp.float32, seed=1))
    y, changed = apply(params, x), apply(params, other)
    chex.assert_trees_all_equal(y[:, :4], changed[:, :4])
    assert not np.allclose(y[:, 4:], changed[:, 4:])


def test_attention_of_bfloat16_has_scores_of_float32():
    """Scores 256 and 257, halved by sqrt(4): bfloat16 would round both to 256."""
    x = jnp.array([[[16, 0, 1, 0], [16, 1, 1, 1]]], jnp.bfloat16)
    qkv = np.zeros((4, 12))
    qkv[[0, 2], [0, 1]] = qkv[[0, 1], [4, 5]] = qkv[3, 8] = 1  # q = (16, 1), k = (16, 0 or 1)
    params = {"qkv": {"kernel": jnp.asarray(qkv, x.dtype)},
              "out": {"kernel": jnp.eye(4, dtype=x.dtype)}}
    y = nn.attention(1, bias=False).apply(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y[0, 1, 0]), sigmoid(0.5), rtol=4e-3)


def test_attention_drops_probabilities_in_training_only():
    layer, x = nn.attention(2, dropout=0.5), normal((2, 5, 4), jnp.float32)
    params, apply = random_params(layer, x), jax.jit(layer.apply, static_argnames="train")
    plain = jax.jit(nn.attention(2).apply)(params, x)
    chex.assert_trees_all_equal(apply(params, x, key=KEY), plain)
    dropped = apply(params, x, key=KEY, train=True)
    assert not np.allclose(dropped, plain)
    assert not np.allclose(dropped, apply(params, x, key=jax.random.key(1), train=True))
    bare = nn.attention(2, bias=False).init(KEY, x)
    assert jax.tree.map(jnp.shape, bare) == {"qkv": {"kernel": (4, 12)}, "out": {"kernel": (4, 4)}}


def test_position_embedding_adds_the_first_rows(x64):
    layer, x = nn.position_embedding(7, dtype=jnp.float64), normal((2, 5, 3))
    params = layer.init(KEY, x)
    chex.assert_trees_all_close(layer.apply(params, x), x + params["embedding"][:5], rtol=1e-14)
    large = nn.position_embedding(101).init(KEY, jnp.ones((1, 1, 53)))["embedding"]
    np.testing.assert_allclose(jnp.std(large), 0.01, rtol=0.05)


def test_global_avg_pool_is_the_mean_over_positions(x64):
    pool, x = nn.global_avg_pool(), normal((3, 5, 7))
    chex.assert_trees_all_close(pool.apply({}, x), np.asarray(x).mean(1), rtol=1e-12)
    image = normal((2, 3, 5, 7))
    chex.assert_trees_all_close(pool.apply({}, image), np.asarray(image).mean((1, 2)), rtol=1e-12)
    y = pool.apply({}, x.at[1, 2:].set(jnp.nan), lengths=jnp.asarray(LENGTHS))
    expected = [np.asarray(row)[:length].mean(0) for row, length in zip(x, LENGTHS)]
    chex.assert_trees_all_close(y, np.stack(expected), rtol=1e-12)
    assert pool.apply({}, x, lengths=jnp.zeros(3, jnp.int32)).tolist() == [[0.0] * 7] * 3


def test_a_network_for_padded_sequences_and_its_gradient_ignore_padding(x64):
    """Lengths reach every layer, in sequences, residual and repeated blocks."""
    wide = {"dtype": jnp.float64}
    block = nn.residual(nn.layer_norm(**wide), nn.attention(2, causal=False, **wide))
    net = nn.sequential(
        nn.dense(4, **wide), nn.repeated(block, 2), nn.lstm(3, reverse=True, **wide),
        nn.global_avg_pool(),
    )
    x, lengths = normal((3, 5, 2)), jnp.asarray(LENGTHS)
    params = random_params(net, x)
    apply = jax.jit(net.apply)
    y, alone = apply(params, x, lengths=lengths), apply(params, x[1:2, :2])
    chex.assert_trees_all_close(y[1:2], alone, rtol=1e-11)

    def loss(params, x):
        return jnp.sum(jnp.sin(net.apply(params, x, lengths=lengths)))

    ours = jax.jit(fbprop.grad(loss, argnums=(0, 1)))(params, x)
    theirs = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-10, atol=1e-13)
    padding = ~np.asarray(nn.sequence_mask(lengths, 5))
    assert (np.asarray(ours[1])[padding] == 0).all()


def test_sequence_mask_counts():
    mask = nn.sequence_mask(jnp.array([0, 2, 3]), 3)
    assert mask.dtype == bool
    assert np.sum(mask, axis=1).tolist() == [0, 2, 3]


X, SEQUENCE = jnp.ones((2, 3)), jnp.ones((2, 5, 3))
ERRORS = {
    "lstm_rank": (ValueError, r"'lstm' takes a batch of sequences.*shape \(2, 3\).*\[B, T, D\]",
                  lambda: nn.lstm(5).init(KEY, X)),
    "gru_rank": (ValueError, r"'gru' takes a batch of sequences.*expected \[B, T, D\]",
                 lambda: nn.gru(5).apply({}, X)),
    "attention_rank": (ValueError, r"'attention' takes a batch of sequences",
                       lambda: nn.attention(1).init(KEY, X)),
    "heads": (ValueError, "got heads=2 expected a divisor of 3 features",
              lambda: nn.attention(2).init(KEY, SEQUENCE)),
    "attention_key": (ValueError, "draws what is left out, got key=None",
                      lambda: nn.attention(1, dropout=0.5).apply(
                          nn.attention(1).init(KEY, SEQUENCE), SEQUENCE, train=True)),
    "attention_dropout": (ValueError, r"got 2 expected a number in \[0, 1\)",
                          lambda: nn.attention(1, dropout=2)),
    "position_rank": (ValueError, r"'position_embedding' takes a batch of sequences",
                      lambda: nn.position_embedding(7).apply({}, X)),
    "context": (ValueError, "context=3 positions, got a sequence of 5 expected at most 3",
                lambda: nn.position_embedding(3).apply({}, SEQUENCE)),
    "lengths_float": (TypeError, r"got float32\[2\] expected integers \[B\]",
                      lambda: nn.lstm(5).apply({}, SEQUENCE, lengths=jnp.ones(2))),
    "lengths_mask": (TypeError, r"got bool\[2, 5\] expected integers \[B\]",
                     lambda: nn.sequence_mask(jnp.ones((2, 5), bool), 5)),
    "pool_rank": (ValueError, r"'global_avg_pool'.*shape \(2, 3\) expected \[B, W, C\]",
                  lambda: nn.global_avg_pool().apply({}, X)),
    "pool_lengths": (ValueError, r"'global_avg_pool' takes a batch of sequences",
                     lambda: nn.global_avg_pool().apply({}, X, lengths=jnp.ones(2, jnp.int32))),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
