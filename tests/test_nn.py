"""Layers and initialisers against their formulas in NumPy, and their gradients."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import nn

KEY = jax.random.key(0)


def normal(shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_params(layer, x):
    """Parameters none of which is 0 or 1, so that a bias left out would be seen."""
    params = jax.eval_shape(layer.init, KEY, x)
    return jax.tree.map(lambda p: normal(p.shape, p.dtype, seed=p.size), params)


def windows(x, sizes, strides, pads, dilations):
    """Output positions and the patch [B, *sizes, C] of zero-padded x under each, by plain loops."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    spans = [(k - 1) * d + 1 for k, d in zip(sizes, dilations)]
    counts = [(n - span) // s + 1 for n, span, s in zip(x.shape[1:-1], spans, strides)]
    for at in itertools.product(*map(range, counts)):
        starts = [i * s for i, s in zip(at, strides)]
        cuts = [slice(i, i + span, d) for i, span, d in zip(starts, spans, dilations)]
        yield at, x[(slice(None), *cuts, slice(None))]


def conv_by_loops(x, kernel, strides, pads, dilations, groups):
    out = {}
    for at, patch in windows(x, kernel.shape[:-2], strides, pads, dilations):
        parts = zip(np.split(patch, groups, axis=-1), np.split(kernel, groups, axis=-1))
        axes = len(kernel.shape) - 1
        out[at] = np.concatenate(
            [np.tensordot(p, k, (range(1, axes + 1), range(axes))) for p, k in parts], axis=-1
        )
    shape = [max(at[i] for at in out) + 1 for i in range(len(strides))]
    result = np.empty((x.shape[0], *shape, kernel.shape[-1]))
    for at, values in out.items():
        result[(slice(None), *at)] = values
    return result


# name, layer's options, input shape, what they mean for the loops: strides, pads, dilations, groups
CONVOLUTIONS = {
    "same": ({}, (2, 5, 7, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    "valid_strided": ({"stride": 2, "padding": "VALID"}, (2, 7, 5, 3), (2, 2), ((0, 0), (0, 0)),
                      (1, 1), 1),
    "same_strided": ({"stride": (2, 3)}, (2, 6, 7, 2), (2, 3), ((0, 1), (1, 1)), (1, 1), 1),
    "dilated": ({"dilation": (1, 2), "padding": ((1, 0), (2, 3))}, (2, 5, 5, 2), (1, 1),
                ((1, 0), (2, 3)), (1, 2), 1),
    "grouped": ({"groups": 2}, (2, 5, 3, 4), (1, 1), ((1, 1), (1, 1)), (1, 1), 2),
    "one_dimension": ({"kernel_size": (3,)}, (2, 7, 3), (1,), ((1, 1),), (1,), 1),
    "three_dimensions": ({"kernel_size": (2, 3, 1), "padding": "VALID"}, (2, 3, 5, 2, 3), (1, 1, 1),
                         ((0, 0),) * 3, (1, 1, 1), 1),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv_equals_loops(x64, case):
    options, shape, strides, pads, dilations, groups = CONVOLUTIONS[case]
    layer = nn.conv(6, **options, dtype=jnp.float64)
    x = normal(shape)
    params = random_params(layer, x)
    kernel = np.asarray(params["kernel"])
    expected = conv_by_loops(np.asarray(x), kernel, strides, pads, dilations, groups)
    chex.assert_trees_all_close(layer.apply(params, x), expected + params["bias"], rtol=1e-12)


def test_conv_without_bias_has_no_bias(x64):
    layer = nn.conv(5, 1, bias=False, dtype=jnp.float64)
    x = normal((2, 3, 3, 2))
    params = layer.init(KEY, x)
    assert set(params) == {"kernel"}
    chex.assert_trees_all_close(layer.apply(params, x), x @ params["kernel"][0, 0], rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3)])
def test_dense_equals_its_formula(x64, shape):
    layer = nn.dense(7, dtype=jnp.float64)
    x = normal(shape)
    params = random_params(layer, x)
    expected = np.asarray(x) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    chex.assert_trees_all_close(layer.apply(params, x), expected, rtol=1e-12)
    assert set(nn.dense(7, bias=False).init(KEY, x)) == {"kernel"}


def test_embedding_looks_up_rows_and_marks_strangers():
    layer = nn.embedding(5, 3)
    tokens = jnp.array([[0, 4], [2, 2]])
    params = layer.init(KEY, tokens)
    table = np.asarray(params["embedding"])
    chex.assert_trees_all_equal(layer.apply(params, tokens), table[np.asarray(tokens)])
    assert np.isnan(layer.apply(params, jnp.array([5]))).all()


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"bias": False}, {"epsilon": 0.1}])
def test_layer_norm_equals_its_formula(x64, options):
    layer = nn.layer_norm(**options, dtype=jnp.float64)
    x = normal((2, 3, 5))
    params = random_params(layer, x)
    assert set(params) == {"scale", "bias"} - {k for k, v in options.items() if v is False}
    rows = np.asarray(x)
    expected = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(
        rows.var(-1, keepdims=True) + options.get("epsilon", 1e-5)
    )
    expected = expected * params.get("scale", 1.0) + params.get("bias", 0.0)
    chex.assert_trees_all_close(layer.apply(params, x), expected, rtol=1e-12)


def test_layer_norm_of_float16_does_not_overflow():
    x = jnp.array([[-500.0, 500.0]], jnp.float16)  # squares are beyond float16's 65,504
    layer = nn.layer_norm(dtype=jnp.float16)
    chex.assert_trees_all_equal(layer.apply(layer.init(KEY, x), x), jnp.sign(x))


POOLS = {
    "default": ((2, 4, 6, 3), {}, (2, 2), (2, 2), ((0, 0), (0, 0))),
    "overlapping": ((2, 7, 5, 3), {"window": 3, "stride": 2}, (3, 3), (2, 2), ((0, 0), (0, 0))),
    "same": ((2, 5, 5, 2), {"window": (2, 3), "stride": 1, "padding": "SAME"}, (2, 3), (1, 1),
             ((0, 1), (1, 1))),
    "padded": ((2, 5, 3), {"window": (3,), "padding": ((2, 1),)}, (3,), (3,), ((2, 1),)),
}


def pooled(x, sizes, strides, pads, reduce):
    ones = (1,) * len(sizes)
    parts = dict(windows(x, sizes, strides, pads, ones))
    shape = [max(at[i] for at in parts) + 1 for i in range(len(sizes))]
    axes = tuple(range(1, len(sizes) + 1))
    rows = [reduce(patch, axes) for patch in parts.values()]
    return np.stack(rows, 1).reshape(x.shape[0], *shape, x.shape[-1])


@pytest.mark.parametrize("case", POOLS)
def test_pools_equal_loops(x64, case):
    shape, options, *where = POOLS[case]
    x = normal(shape)
    away = np.asarray(x) - 100  # below the zeros that loops pad with, so those must not win
    largest = pooled(np.asarray(x) + 100, *where, np.max) - 100
    chex.assert_trees_all_close(nn.max_pool(**options).apply({}, x), largest, rtol=1e-12)
    chex.assert_trees_all_close(
        nn.max_pool(**options).apply({}, jnp.asarray(away)), largest - 100, rtol=1e-12
    )
    total = pooled(np.asarray(x), *where, np.sum)
    inside = pooled(np.ones_like(x), *where, np.sum)
    size = math.prod(where[0])
    chex.assert_trees_all_close(nn.avg_pool(**options).apply({}, x), total / size, rtol=1e-12)
    chex.assert_trees_all_close(
        nn.avg_pool(**options, count_include_pad=False).apply({}, x), total / inside, rtol=1e-12
    )


def test_max_pool_of_integers():
    x = jnp.array([-3, -7, -5, -2], jnp.int32).reshape(1, 2, 2, 1)
    assert nn.max_pool().apply({}, x).tolist() == [[[[-2]]]]


ACTIVATIONS = {
    "relu": (nn.relu(), lambda x: np.maximum(x, 0)),
    "leaky_relu": (nn.leaky_relu(0.1), lambda x: np.where(x > 0, x, 0.1 * x)),
    "elu": (nn.elu(2.0), lambda x: np.where(x > 0, x, 2 * np.expm1(x))),
    "gelu": (nn.gelu(), lambda x: x / 2 * (
        1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "gelu_erf": (nn.gelu(approximate=False), lambda x: x / 2 * (
        1 + np.vectorize(math.erf)(x / math.sqrt(2)))),
    "silu": (nn.silu(), lambda x: x / (1 + np.exp(-x))),
    "softplus": (nn.softplus(), lambda x: np.log(1 + np.exp(x))),
    "sigmoid": (nn.sigmoid(), lambda x: 1 / (1 + np.exp(-x))),
    "tanh": (nn.tanh(), np.tanh),
    "function": (nn.function(jnp.sin), np.sin),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_its_formula(x64, name):
    layer, formula = ACTIVATIONS[name]
    x = normal((5, 7))
    assert layer.init(KEY, x) == {}
    chex.assert_trees_all_close(layer.apply({}, x), formula(np.asarray(x)), rtol=1e-11)


def test_dropout_drops_its_share_and_keeps_the_mean():
    layer, x = nn.dropout(0.25), jnp.ones((100, 100))
    y = layer.apply({}, x, key=KEY, train=True)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    # 10,000 independent elements: the share has standard deviation 0.0043, this is 5 of them.
    assert abs(float(jnp.mean(y == 0)) - 0.25) < 0.022
    chex.assert_trees_all_equal(y, layer.apply({}, x, key=KEY, train=True))
    assert not np.array_equal(y, layer.apply({}, x, key=jax.random.key(1), train=True))


def test_dropout_passes_everything_outside_training():
    x = normal((3, 5), jnp.float32)
    chex.assert_trees_all_equal(nn.dropout(0.5).apply({}, x), x)
    chex.assert_trees_all_equal(nn.dropout(0.5).apply({}, x, key=KEY), x)
    chex.assert_trees_all_equal(nn.dropout(0.0).apply({}, x, train=True), x)


def test_flatten():
    x = jnp.arange(30).reshape(2, 3, 5)
    chex.assert_trees_all_equal(nn.flatten().apply({}, x), x.reshape(2, 15))


LAYERS = {
    "dense": (lambda dtype: nn.dense(5, dtype=dtype), (2, 3)),
    "conv": (lambda dtype: nn.conv(5, dtype=dtype), (2, 5, 3, 2)),
    "conv_strided": (lambda dtype: nn.conv(5, 3, stride=2, dtype=dtype), (2, 5, 7, 2)),
    "conv_dilated": (lambda dtype: nn.conv(5, 3, dilation=2, dtype=dtype), (2, 5, 7, 2)),
    "conv_depthwise": (lambda dtype: nn.conv(6, 3, groups=3, dtype=dtype), (2, 5, 3, 3)),
    "conv_1d": (lambda dtype: nn.conv(3, (2,), padding="VALID", dtype=dtype), (2, 5, 2)),
    "layer_norm": (lambda dtype: nn.layer_norm(dtype=dtype), (2, 3, 5)),
    "rms_norm": (lambda dtype: nn.rms_norm(dtype=dtype), (2, 3, 5)),
    "group_norm": (lambda dtype: nn.group_norm(2, dtype=dtype), (2, 3, 5, 6)),
    "attention": (lambda dtype: nn.attention(2, dropout=0.3, dtype=dtype), (2, 5, 6)),
    "position_embedding": (lambda dtype: nn.position_embedding(7, dtype=dtype), (2, 5, 3)),
    "lstm": (lambda dtype: nn.lstm(5, dtype=dtype), (2, 3, 7)),
    "lstm_reverse": (lambda dtype: nn.lstm(5, reverse=True, last=True, dtype=dtype), (2, 3, 7)),
    "gru": (lambda dtype: nn.gru(5, dtype=dtype), (2, 3, 7)),
    "residual": (lambda dtype: nn.residual(nn.dense(3, dtype=dtype), nn.tanh(), nn.dropout(0.3),
                                           shortcut=nn.dense(3, dtype=dtype)), (2, 5)),
    "repeated": (lambda dtype: nn.repeated(nn.residual(nn.dense(5, dtype=dtype)), 3), (2, 5)),
    "global_avg_pool": (lambda dtype: nn.global_avg_pool(), (2, 5, 3, 7)),
    "max_pool": (lambda dtype: nn.max_pool(2), (2, 4, 6, 3)),
    "max_pool_overlapping": (lambda dtype: nn.max_pool(3, stride=2, padding="SAME"), (2, 5, 7, 3)),
    "avg_pool": (lambda dtype: nn.avg_pool(2), (2, 4, 6, 3)),
    "avg_pool_inside": (
        lambda dtype: nn.avg_pool(3, stride=2, padding="SAME", count_include_pad=False),
        (2, 5, 7, 3)),
    "flatten": (lambda dtype: nn.flatten(), (2, 3, 5)),
    "dropout": (lambda dtype: nn.dropout(0.3), (5, 7)),
    **{name: (lambda dtype, layer=layer: layer, (3, 5))
       for name, (layer, _) in ACTIVATIONS.items()},
    "sequential": (
        lambda dtype: nn.sequential(nn.conv(3, dtype=dtype), nn.relu(), nn.max_pool(), nn.flatten(),
                                    nn.dropout(0.3), nn.dense(5, dtype=dtype)),
        (2, 4, 6, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_is_that_of_jax(x64, name):
    make, shape = LAYERS[name]
    layer, x = make(jnp.float64), normal(shape)
    params = random_params(layer, x)
    weight = normal(jax.eval_shape(layer.apply, params, x).shape, seed=1)

    def loss(params, x):
        return jnp.sum(weight * layer.apply(params, x, key=KEY, train=True))

    both = lambda: [ad.grad(loss, argnums=(0, 1))(params, x) for ad in (fbprop, jax)]
    chex.assert_trees_all_close(*jax.jit(both)(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", LAYERS)
def test_dtype_is_kept(x64, name, dtype):
    make, shape = LAYERS[name]
    layer, x = make(dtype), jax.ShapeDtypeStruct(shape, dtype)
    params = jax.eval_shape(layer.init, KEY, x)
    assert {p.dtype.name for p in jax.tree.leaves(params)} <= {dtype}
    apply = lambda params, x: layer.apply(params, x, key=KEY, train=True)
    assert jax.eval_shape(apply, params, x).dtype == dtype


def test_embedding_gradient_is_that_of_jax(x64):
    layer, tokens = nn.embedding(5, 3, dtype=jnp.float64), jnp.array([[0, 4, 2], [2, 2, 1]])
    params = layer.init(KEY, tokens)
    loss = lambda params: jnp.sum(jnp.sin(layer.apply(params, tokens)))
    both = (jax.jit(ad.grad(loss))(params) for ad in (fbprop, jax))
    chex.assert_trees_all_close(*both, rtol=1e-12)


def test_sequential_names_parameters_and_composes():
    net = nn.sequential(
        nn.conv(2, name="stem"), nn.relu(), nn.conv(3), nn.relu(), nn.conv(5), nn.flatten(),
        nn.sequential(nn.dense(7), nn.tanh(), nn.dense(3), name="head"),
    )
    x = normal((2, 3, 3, 1), jnp.float32)
    params = net.init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert jax.tree.map(jnp.shape, params) == {
        "stem": {"kernel": (3, 3, 1, 2), "bias": (2,)},
        "conv_0": {"kernel": (3, 3, 2, 3), "bias": (3,)},
        "conv_1": {"kernel": (3, 3, 3, 5), "bias": (5,)},
        "head": {"dense_0": {"kernel": (45, 7), "bias": (7,)},
                 "dense_1": {"kernel": (7, 3), "bias": (3,)}},
    }
    y = jax.nn.relu(nn.conv(2).apply(params["stem"], x))
    y = nn.conv(5).apply(params["conv_1"], jax.nn.relu(nn.conv(3).apply(params["conv_0"], y)))
    y = jnp.tanh(nn.dense(7).apply(params["head"]["dense_0"], y.reshape(2, -1)))
    y = nn.dense(3).apply(params["head"]["dense_1"], y)
    chex.assert_trees_all_close(jax.jit(net.apply)(params, x), y, rtol=1e-5)


def test_scopes_are_the_paths_of_the_parameters():
    net = nn.sequential(nn.sequential(nn.dense(3), nn.dense(5), name="encoder"), nn.dense(2))
    params = net.init(KEY, jnp.ones((2, 3)))
    jaxpr = jax.make_jaxpr(net.apply)(params, jnp.ones((2, 3)))
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    scopes = {str(e.source_info.name_stack) for e in products}
    paths = {"/".join(k.key for k in path[:-1]) for path, _ in jax.tree.leaves_with_path(params)}
    assert scopes == {f"sequential/{path}" for path in paths}


def test_layers_of_a_sequence_draw_different_numbers():
    x = jnp.ones((2, 101))
    both = nn.sequential(nn.dropout(0.5), nn.dropout(0.5)).apply({}, x, key=KEY, train=True)
    assert 0.1 < float(jnp.mean(both > 0)) < 0.4  # the same mask twice would leave a half
    same = nn.sequential(nn.dense(3), nn.dense(3)).init(KEY, jnp.ones((1, 3)))
    assert not np.array_equal(same["dense_0"]["kernel"], same["dense_1"]["kernel"])


def test_init_is_a_function_of_its_key_and_can_be_jitted():
    net = nn.sequential(nn.conv(3), nn.flatten(), nn.dense(2))
    x = jnp.ones((1, 3, 3, 1))
    params = net.init(KEY, x)
    chex.assert_trees_all_equal(params, net.init(KEY, jnp.ones((7, 3, 3, 1))))
    chex.assert_trees_all_close(params, jax.jit(net.init)(KEY, x), rtol=1e-6)
    other = net.init(jax.random.key(1), x)
    assert not np.array_equal(params["dense"]["kernel"], other["dense"]["kernel"])


def test_layer_unpacks_and_prints_its_name():
    layer = nn.dense(3, name="head")
    init, apply = layer
    x = jnp.ones((1, 2))
    params = init(KEY, x)
    chex.assert_trees_all_equal(apply(params, x), layer.apply(params, x))
    assert repr(layer) == "<layer 'head'>"


FANS = {"lecun": 1 / 72, "he": 2 / 72, "kaiming": 2 / 72, "glorot": 2 / (72 + 720),
        "xavier": 2 / (72 + 720)}


@pytest.mark.parametrize("shape", ["normal", "uniform"])
@pytest.mark.parametrize("name", FANS)
def test_initializer_has_its_variance(name, shape):
    kernel = getattr(nn.initializers, f"{name}_{shape}")()(KEY, (3, 3, 8, 80))
    # 5,760 elements: the variance is known to about 2%.
    np.testing.assert_allclose(jnp.var(kernel), FANS[name], rtol=0.08)


def test_initial_values_are_as_asked():
    x = jnp.ones((1, 3))
    params = nn.dense(2, kernel_init=nn.initializers.ones,
                      bias_init=nn.initializers.constant(7.0)).init(KEY, x)
    chex.assert_trees_all_equal(params, {"kernel": jnp.ones((3, 2)), "bias": jnp.full(2, 7.0)})
    assert jnp.std(nn.embedding(101, 7).init(KEY, jnp.arange(3))["embedding"]) < 0.025
    fresh = nn.layer_norm().init(KEY, x)
    chex.assert_trees_all_equal(fresh, {"scale": jnp.ones(3), "bias": jnp.zeros(3)})


X, IMAGE = jnp.ones((2, 3)), jnp.ones((2, 5, 5, 3))
ERRORS = {
    "init_by_shape": (TypeError, "got \\(2, 3\\) expected an array or a jax.ShapeDtypeStruct",
                      lambda: nn.dense(3).init(KEY, (2, 3))),
    "scalar_input": (ValueError, "got an input of shape \\(\\) expected at least one dimension",
                     lambda: nn.dense(3).init(KEY, jnp.ones(()))),
    "conv_rank": (ValueError, r"'conv'.*got an input of shape \(2, 3\) expected \[B, H, W, C\]",
                  lambda: nn.conv(3).init(KEY, X)),
    "conv_apply_rank": (ValueError, r"'stem'.*expected \[B, W, C\]",
                        lambda: nn.conv(3, (3,), name="stem").apply({}, IMAGE)),
    "groups": (ValueError, "got groups=2 expected a divisor of 3 input channels and of features=4",
               lambda: nn.conv(4, groups=2).init(KEY, IMAGE)),
    "stride": (ValueError, r"conv's stride has one number.*got \(1, 2, 3\) expected 2",
               lambda: nn.conv(4, stride=(1, 2, 3))),
    "pool_stride": (ValueError, r"avg_pool's stride.*got \(1,\) expected 2",
                    lambda: nn.avg_pool(2, stride=(1,))),
    "pool_rank": (ValueError, r"'max_pool'.*expected \[B, H, W, C\]",
                  lambda: nn.max_pool().apply({}, X)),
    "dropout_key": (ValueError, "'dropout'.*got key=None with train=True expected a random key",
                    lambda: nn.dropout(0.5).apply({}, X, train=True)),
    "dropout_rate": (ValueError, r"got 1.5 expected a number in \[0, 1\)",
                     lambda: nn.dropout(1.5)),
    "embedding_dtype": (TypeError, "'embedding'.*got an input of dtype float32 expected int32",
                        lambda: nn.embedding(3, 2).apply({}, X)),
    "names": (ValueError, "got .*'dense_0', 'dense_1', 'dense_0'.* expected no repetition",
              lambda: nn.sequential(nn.dense(3), nn.dense(3), nn.dense(3, name="dense_0"))),
    "foreign": (ValueError, "'sequential'.*got 'conv' expected some of \\['dense'\\]",
                lambda: nn.sequential(nn.dense(3)).apply({"conv": {}}, X)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
