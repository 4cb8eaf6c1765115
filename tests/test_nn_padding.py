"""What does not count is not read; what does not fit gets a sentence; nothing is too empty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import nn

JUNK = (float("nan"), float("inf"), -float("inf"), 6e4)
KEY = jax.random.key(0)


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_losses_do_not_read_what_does_not_count(junk, dtype):
    where = jnp.array([True, False, True])
    labels = jnp.array([1, -7, 0])
    rows = jnp.array([[0.5, 1.0], [junk, junk], [2.0, -1.0]], dtype)
    targets = jnp.flip(rows, 1)

    def both(rows, targets):
        entropy = nn.softmax_cross_entropy(rows, labels, label_smoothing=0.1, where=where)
        return entropy + nn.mean_squared_error(rows, targets, where=where[:, None])

    expected = nn.softmax_cross_entropy(rows[::2], labels[::2], label_smoothing=0.1)
    expected += nn.mean_squared_error(rows[::2], targets[::2])
    for module in (fbprop, jax):
        value, gradients = jax.jit(module.value_and_grad(both, (0, 1)))(rows, targets)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert finite(gradients)
        assert all((g[1] == 0).all() and (g[::2] != 0).all() for g in gradients)
    assert nn.accuracy(rows, labels, where=where) == 1.0


def test_a_mean_of_nothing_is_zero():
    none, rows = jnp.zeros(2, bool), jnp.full((2, 3), jnp.nan)
    losses = [
        lambda x: nn.softmax_cross_entropy(x, jnp.array([0, 5]), where=none),
        lambda x: nn.mean_squared_error(x, x, where=none[:, None]),
    ]
    for loss in losses:
        value, gradient = fbprop.value_and_grad(loss)(rows)
        assert value == 0
        assert (gradient == 0).all()
    assert nn.accuracy(rows, jnp.array([0, 1]), where=none) == 0


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8"])
def test_labels_and_tokens_outside_are_nan_and_nobody_elses(dtype):
    layer, n = nn.embedding(200, 2), 200
    params = layer.init(KEY, jnp.zeros(3, int))
    outside = {"int8": -1, "int32": 200, "uint8": 255}[dtype]
    tokens = jnp.array([3, outside], dtype)
    y, pullback = fbprop.vjp(lambda p: layer.apply(p, tokens), params)
    assert jnp.isnan(y[1]).all()
    assert (y[0] == params["embedding"][3]).all()
    (gradient,) = pullback(jnp.ones_like(y))
    assert gradient["embedding"].sum() == 2 == gradient["embedding"][3].sum()
    logits = jnp.zeros((2, n))
    loss = lambda x: nn.softmax_cross_entropy(x, tokens)
    assert jnp.isnan(loss(logits))
    assert nn.accuracy(logits.at[:, -1].set(1.0), tokens) == 0


LAYERS = [
    nn.attention(2), nn.attention(2, causal=False), nn.lstm(4), nn.lstm(4, last=True),
    nn.gru(4, reverse=True), nn.global_avg_pool(),
    nn.bidirectional(lambda **options: nn.gru(3, **options)),
    nn.sequential(nn.dense(4), nn.layer_norm(), nn.residual(nn.attention(1)), nn.lstm(3)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_padding_reaches_nothing(layer):
    """Neither values nor gradients, whatever it holds; a sequence of length 0 is all padding."""
    lengths, rng = jnp.array([2, 0, 3]), np.random.default_rng(0)
    clean = jnp.asarray(rng.standard_normal((3, 3, 4)), "float32")
    real = nn.sequence_mask(lengths, 3)[..., None]
    params = layer.init(KEY, clean)

    def loss(params, x):
        y = layer.apply(params, x, lengths=lengths)
        return jnp.sum(jnp.where(real, y, 0.0) ** 2 if y.ndim == 3 else y**2)

    both = jax.jit(fbprop.value_and_grad(loss, (0, 1)))
    value, gradients = both(params, jnp.where(real, clean, 0.0))
    assert finite(gradients)
    for junk in JUNK:
        got = both(params, jnp.where(real, clean, junk))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((value, gradients))):
            np.testing.assert_array_equal(a, b)
    assert (jnp.where(real, 0, gradients[1]) == 0).all()


def test_attention_and_recurrent_layers_give_zero_at_padding():
    x, lengths = jnp.ones((2, 3, 4)), jnp.array([1, 0])
    for layer in (nn.attention(2), nn.lstm(4)):
        y = layer.apply(layer.init(KEY, x), x, lengths=lengths)
        assert not y[0, 1:].any()
        assert not y[1].any()
        assert y[0, 0].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_of_many_16_bit_numbers(dtype):
    x = jnp.full((1, 128, 128, 1), 1.5, dtype)
    layers = (nn.avg_pool(128), nn.avg_pool(128, count_include_pad=False), nn.global_avg_pool())
    for layer in layers:
        y = layer.apply({}, x)
        assert y.dtype == dtype
        assert (y == 1.5).all()
    large = jnp.array([6e4, -6e4], "float16")
    assert nn.mean_squared_error(large, -large) == pytest.approx(1.2e5**2, rel=1e-3)
    padded = nn.avg_pool(2, padding=((2, 2), (2, 2)), count_include_pad=False).apply({}, x)
    assert (padded[0, 0] == 0).all()  # a window of padding only


def initialised(layer, *shape, dtype="float32"):
    return layer, layer.init(KEY, jax.ShapeDtypeStruct(shape, dtype))


CASES = {
    "dense width": (*initialised(nn.dense(3), 2, 5), (2, 4), {}, r"'dense'.*got.*\(2, 4\) exp.*5"),
    "lstm width": (*initialised(nn.lstm(3), 2, 5, 4), (2, 5, 3), {}, "'lstm'.*expected.*4"),
    "gru width": (*initialised(nn.gru(3), 2, 5, 4), (2, 5, 3), {}, "'gru'.*expected.*4"),
    "attention width": (*initialised(nn.attention(2), 2, 5, 4), (2, 5, 6), {}, "'qkv'.*exp.*4"),
    "layer norm width": (*initialised(nn.layer_norm(), 2, 5), (2, 4), {}, "'layer_norm'.*5"),
    "conv channels": (*initialised(nn.conv(3), 1, 5, 5, 3), (1, 3, 5, 5), {}, "'conv'.*exp.*3"),
    "conv window": (
        *initialised(nn.conv(3, 3, padding="VALID"), 1, 5, 5, 3), (1, 2, 5, 3), {},
        r"'conv'.*window of \(3, 3\) expected at most \(2, 5\)",
    ),
    "pool window": (nn.max_pool(3), {}, (1, 2, 5, 3), {}, "'max_pool'.*window.*channels last"),
    "foreign parameters": (nn.dense(3), {"scale": 0}, (2, 5), {}, r"'dense'.*'scale'.*'kernel'"),
    "no parameters": (nn.conv(3), (), (1, 5, 5, 3), {}, "'conv'.*tuple expected.*'kernel'"),
    "embedding parameters": (nn.embedding(3, 2), {}, None, {}, "'embedding'.*expected a dict"),
    "too few lengths": (
        *initialised(nn.lstm(3), 2, 5, 4), (2, 5, 4), {"lengths": jnp.array([1])},
        "lengths has one number per sequence, got 1 of them expected 2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_gets_a_sentence(name):
    layer, params, shape, options, match = CASES[name]
    x = jnp.zeros(2, int) if shape is None else jnp.zeros(shape)
    with pytest.raises(ValueError, match=match):
        layer.apply(params, x, **options)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16"])
def test_conv_takes_the_dtype_of_its_kernel(dtype):
    layer, params = initialised(nn.conv(3), 1, 5, 5, 3)
    with pytest.raises(TypeError, match=f"'conv'.*got.*{dtype} expected float32.*astype"):
        layer.apply(params, jnp.zeros((1, 5, 5, 3), dtype))


def test_images_with_channels_first_get_a_sentence():
    with pytest.raises(ValueError, match=r"window.*\[B, C, H, W\]"):
        nn.convnet(10).init(KEY, jnp.zeros((2, 3, 32, 32)))


@pytest.mark.parametrize("smoothing", [1.0, -0.1, 2])
def test_label_smoothing_is_a_share(smoothing):
    with pytest.raises(ValueError, match=rf"label_smoothing.*got {smoothing} expected.*\[0, 1\)"):
        nn.softmax_cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), label_smoothing=smoothing)


@pytest.mark.parametrize("where", [jnp.ones(3, bool), jnp.ones(2), jnp.ones((2, 2), bool)])
def test_where_is_a_mask_of_the_examples(where):
    with pytest.raises(ValueError, match=r"where says of each element.*expected booleans.*\[2\]"):
        nn.softmax_cross_entropy(jnp.zeros((2, 2)), jnp.array([0, 1]), where=where)


EMPTY = [
    (nn.dense(3), (0, 5)), (nn.dense(3), (2, 0)), (nn.dense(0), (2, 3)),
    (nn.conv(3), (0, 5, 5, 2)), (nn.conv(3), (2, 5, 5, 0)), (nn.conv(3), (2, 0, 5, 3)),
    (nn.max_pool(2), (0, 4, 4, 3)), (nn.avg_pool(2), (2, 4, 4, 0)), (nn.max_pool(2), (2, 0, 4, 3)),
    (nn.layer_norm(), (0, 3)), (nn.layer_norm(), (2, 0)), (nn.rms_norm(), (2, 0)),
    (nn.group_norm(1), (0, 4, 4, 2)), (nn.batch_norm(), (0, 3)), (nn.lstm(3), (0, 4, 2)),
    (nn.lstm(3), (2, 0, 2)), (nn.gru(3), (2, 4, 0)), (nn.attention(1), (0, 4, 2)),
    (nn.attention(1), (2, 0, 2)), (nn.mlp(4, 0), (2, 3)),
    (nn.convnet(3, channels=(2,)), (0, 4, 4, 1)),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of means of nothing
@pytest.mark.parametrize(("layer", "shape"), EMPTY, ids=lambda v: getattr(v, "name", str(v)))
def test_empty_inputs_give_what_jax_gives(layer, shape):
    x = jnp.zeros(shape)
    params, state = layer.init(KEY, x), layer.init_state(x)

    def total(params, x):
        y, _ = layer.apply(params, x, state=state, train=True)
        assert 0 in y.shape or 0 in shape
        return jnp.sum(y)

    both = lambda *args: [ad.grad(total, (0, 1))(*args) for ad in (fbprop, jax)]
    got, expected = jax.jit(both)(params, x)
    # To the bit, but for a bias of steps that are not empty: it is summed chunk by chunk.
    rounding = 1e-6 if layer.name == "gru" else 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=rounding)
