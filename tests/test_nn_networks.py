"""Ready networks: sizes, structure, initial values, gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import nn

KEY = jax.random.key(0)
TOKENS = jnp.array([[0, 4, 2, 6, 1], [3, 3, 0, 5, 2]])
IMAGE = (2, 8, 8, 1)



def gpt(**options):
    return nn.gpt(7, **{"layers": 2, "heads": 2, "features": 4, "context": 5} | options)


def random_params(net, x):
    """Drawn by NumPy, as compiling the initialisers takes longer than the rest of these tests."""
    draw = np.random.default_rng(0).normal
    shapes = jax.eval_shape(net.init, KEY, x)
    return jax.tree.map(lambda p: jnp.asarray(draw(0, 0.4, p.shape), p.dtype), shapes)


def tokens(batch=1, steps=1024):
    return jax.ShapeDtypeStruct((batch, steps), jnp.int32)


def count(net, x):
    return nn.count_parameters(jax.eval_shape(lambda: net.init(KEY, x)))


def test_sizes_are_the_published_ones():
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    gpt2 = nn.gpt(50257, layers=12, heads=12, features=768, context=1024, scan=True)
    assert count(gpt2, tokens()) == 124_439_808  # GPT-2 small
    # He et al. 2016, table 6: 0.27 and 0.46 million, with shortcuts without parameters.
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert round((count(nn.resnet(10), images) - shortcuts) / 1e6, 2) == 0.27
    assert round((count(nn.resnet(10, depth=32), images) - shortcuts) / 1e6, 2) == 0.46
    assert count(nn.mlp(300, 10), jnp.ones((2, 28, 28))) == 784 * 300 + 300 + 300 * 10 + 10


def test_resnet_has_its_depth_in_layers_with_weights():
    for depth in (8, 20):
        net = nn.resnet(10, depth=depth)
        shapes = jax.eval_shape(lambda: net.init(KEY, jnp.ones(IMAGE)))
        kernels = [k for k in jax.tree.leaves(shapes) if k.ndim > 1 and k.shape[:2] != (1, 1)]
        assert len(kernels) == depth


def logits_of(net, x):
    """A loss-like function of the parameters, whatever else the network needs."""
    def run(params, state):
        y, _ = net.apply(params, x, key=KEY, train=True, state=state)
        return jnp.mean(jnp.sin(y.astype(jnp.float64)))

    return run


NETWORKS = {
    "mlp": lambda dtype: (nn.mlp(5, 3, dropout=0.3, activation=nn.gelu, dtype=dtype), (2, 3)),
    "convnet": lambda dtype: (nn.convnet(3, channels=(2, 3), convolutions=1, dropout=0.3,
                                         dtype=dtype), IMAGE),
    "convnet_norm": lambda dtype: (nn.convnet(3, channels=(2,), convolutions=2,
                                              norm=nn.batch_norm, dtype=dtype), IMAGE),
    "resnet": lambda dtype: (nn.resnet(3, depth=8, width=2, dtype=dtype), IMAGE),
    "gpt": lambda dtype: (gpt(tie=False, dropout=0.3, dtype=dtype), None),
    "gpt_scan": lambda dtype: (gpt(scan=True, remat=True, dtype=dtype), None),
    "lstm_lm": lambda dtype: (nn.lstm_lm(7, features=3, layers=2, dropout=0.3, dtype=dtype), None),
    "gru_lm": lambda dtype: (nn.gru_lm(7, features=3, tie=True, dtype=dtype), None),
}


def example(shape, dtype):
    if shape is None:
        return TOKENS
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize("name", ["mlp", "convnet_norm", "resnet", "gpt_scan", "lstm_lm"])
def test_gradient_is_that_of_jax(x64, name):
    net, shape = NETWORKS[name](jnp.float64)
    x = example(shape, jnp.float64)
    params, state = random_params(net, x), net.init_state(x)
    # Of no arguments, so that XLA computes it while it compiles: see test_rules.py.
    both = jax.jit(lambda: [ad.grad(logits_of(net, x))(params, state) for ad in (fbprop, jax)])()
    chex.assert_trees_all_close(*both, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_are_promoted_in_layers_where_the_user_does_not_want_them_to_be(x64, name):
    """The setting is about the user's arrays; in `apply` the layers' own broadcast."""
    net, shape = NETWORKS[name](jnp.float64)
    x = example(shape, jnp.float64)

    def gradient():
        return fbprop.grad(logits_of(net, x))(net.init(KEY, x), net.init_state(x))

    with jax.numpy_rank_promotion("raise"):
        of = jax.eval_shape(gradient)
        with pytest.raises(ValueError, match="rank_promotion"):
            jnp.ones((2, 3)) + jnp.ones(3)
    assert jax.tree.structure(of) == jax.tree.structure(jax.eval_shape(net.init, KEY, x))


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_stays_bfloat16(name):
    net, shape = NETWORKS[name](jnp.bfloat16)
    x = example(shape, jnp.bfloat16)
    params = jax.eval_shape(net.init, KEY, x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    y = net.out_shape(x)
    expected = (2, 3) if shape is not None else (2, 5, 7)
    assert (y.shape, y.dtype) == (expected, jnp.bfloat16)


def test_mlp_is_its_layers():
    net, x = nn.mlp(5, 3), jnp.ones((2, 3, 2))
    params = net.init(KEY, x)
    hidden = jax.nn.relu(nn.dense(5).apply(params["dense_0"], x.reshape(2, 6)))
    expected = nn.dense(3).apply(params["dense_1"], hidden)
    chex.assert_trees_all_close(net.apply(params, x), expected, rtol=1e-6)


def test_gpt_sees_nothing_later():
    net = gpt(layers=1)
    params = random_params(net, TOKENS)
    y, other = (jax.jit(net.apply)(params, t) for t in (TOKENS, TOKENS.at[:, 3:].set(6)))
    chex.assert_trees_all_close(y[:, :3], other[:, :3], rtol=1e-6)
    assert not np.allclose(y[:, 3:], other[:, 3:], rtol=1e-3)


def test_gpt_with_scan_is_gpt(x64):
    plain, loop = gpt(dtype=jnp.float64), gpt(scan=True, dtype=jnp.float64)
    params = random_params(plain, TOKENS)
    blocks = [params.pop("block_0"), params.pop("block_1")]
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *blocks)
    expected = jax.jit(plain.apply)(params | {"block_0": blocks[0], "block_1": blocks[1]}, TOKENS)
    got = jax.jit(loop.apply)(params | {"repeated": {"block": stacked}}, TOKENS)
    chex.assert_trees_all_close(got, expected, rtol=1e-12)


def test_gpt_starts_as_gpt2():
    net = nn.gpt(101, layers=8, heads=2, features=32, context=101, scan=True)
    params = jax.jit(lambda key: net.init(key, tokens(1, 5)))(KEY)
    block = params["repeated"]["block"]
    deviations = {
        0.02: [params["embedding"]["embedding"], block["attention"]["attention"]["qkv"]["kernel"],
               block["mlp"]["dense_0"]["kernel"]],
        0.01: [params["position_embedding"]["embedding"]],
        0.02 / 4: [block["attention"]["attention"]["out"]["kernel"],
                   block["mlp"]["dense_1"]["kernel"]],
    }
    for expected, arrays in deviations.items():
        for array in arrays:
            np.testing.assert_allclose(jnp.std(array), expected, rtol=0.06)


@pytest.mark.parametrize(("make", "tied"), [
    (nn.lstm_lm, False), (nn.lstm_lm, True), (nn.gru_lm, False), (nn.gru_lm, True)])
def test_recurrent_language_model_is_its_layers(make, tied):
    net = make(7, features=3, tie=tied)
    params = random_params(net, TOKENS)
    cell = make.__name__.removesuffix("_lm")
    hidden = getattr(nn, cell)(3).apply(params[cell], params["embedding"]["embedding"][TOKENS])
    if tied:
        expected = hidden @ params["embedding"]["embedding"].T
    else:
        expected = nn.dense(7).apply(params["head"], hidden)
    assert ("head" in params) == (not tied)
    chex.assert_trees_all_close(net.apply(params, TOKENS), expected, rtol=1e-5)


@pytest.mark.parametrize("net", [gpt(layers=1), nn.gru_lm(7, features=3, dropout=0.3)])
def test_next_token_loss_is_that_of_the_logits(net):
    params, labels = random_params(net, TOKENS), TOKENS[:, ::-1]
    where, told = labels > 1, {"key": KEY, "train": True}
    given = {"where": where, "label_smoothing": 0.1}

    def plain(params):
        return nn.softmax_cross_entropy(net.apply(params, TOKENS, **told), labels, **given)

    def fused(params):
        return nn.next_token_loss(net, params, TOKENS, labels, **given, **told)

    both = [fbprop.value_and_grad(f) for f in (plain, fused)]
    expected, got = jax.jit(lambda params: [f(params) for f in both])(params)
    chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)


def test_convnet_uses_running_statistics_outside_training():
    net = nn.convnet(3, channels=(2,), convolutions=1, norm=nn.batch_norm)
    x = example(IMAGE, jnp.float32)
    params, state = random_params(net, x), net.init_state(x)
    apply = jax.jit(net.apply, static_argnames="train")
    alone, _ = apply(params, x[:1], state=state)
    together, _ = apply(params, x, state=state)
    chex.assert_trees_all_close(together[:1], alone, rtol=1e-5, atol=1e-6)
    trained, new = apply(params, x, state=state, train=True)
    assert not np.allclose(trained[:1], alone, rtol=1e-2)
    assert not np.allclose(new["batch_norm"]["mean"], 0)
    assert not nn.convnet(3).stateful


ERRORS = {
    "no_sizes": (ValueError, r"got no sizes expected at least one", lambda: nn.mlp()),
    "depth": (ValueError, r"got depth=18 expected 6 n \+ 2", lambda: nn.resnet(10, depth=18)),
    "shallow": (ValueError, r"got depth=2 expected 6 n \+ 2", lambda: nn.resnet(10, depth=2)),
    "remat": (ValueError, "got remat=True with scan=False expected scan=True",
              lambda: gpt(remat=True)),
    "context": (ValueError, "context=5 positions, got a sequence of 6",
                lambda: gpt().init(KEY, tokens(1, 6))),
    "heads": (ValueError, "got heads=3 expected a divisor of 4",
              lambda: gpt(heads=3).init(KEY, TOKENS)),
    "floats": (TypeError, "got an input of dtype float32 expected int32",
               lambda: nn.lstm_lm(7, features=3).init(KEY, jnp.ones((2, 3)))),
    "no_language": (TypeError, "knows where gpt, lstm_lm and gru_lm end, got <layer 'mlp'>",
                    lambda: nn.next_token_loss(nn.mlp(3), {}, TOKENS, TOKENS)),
    "strangers": (ValueError, "'gpt'.*got 'decoder' expected some of",
                  lambda: gpt().apply({"decoder": {}}, TOKENS)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
