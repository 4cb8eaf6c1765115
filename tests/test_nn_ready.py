"""Vision transformer, autoencoder, variational autoencoder: values, gradients, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import nn, ops

KEY = jax.random.key(0)


def moved(params):
    """Parameters none of which are 0 any more."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: np.asarray(p + 0.3 * rng.normal(size=p.shape), p.dtype), params)


def normed(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def attended(x, p, heads):
    q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in np.split(dense(x, p["qkv"]), 3, -1))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return dense(np.einsum("bhts,bshd->bthd", shares, v).reshape(x.shape), p["out"])


def vit_by_hand(params, x, patch, heads, blocks):
    b, h, w, c = x.shape
    cut = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = params["patches"]["kernel"]
    squares = cut.reshape(b, -1, patch * patch * c) @ kernel.reshape(-1, kernel.shape[-1])
    squares = squares + params["patches"]["bias"]
    token = np.broadcast_to(params["class_token"]["embedding"], (b, 1, squares.shape[-1]))
    y = np.concatenate([token, squares], 1) + params["position_embedding"]["embedding"]
    for i in range(blocks):
        p = params[f"block_{i}"]
        x = normed(y, p["attention"]["layer_norm"])
        y = y + attended(x, p["attention"]["attention"], heads)
        z = dense(normed(y, p["mlp"]["layer_norm"]), p["mlp"]["dense_0"])
        z = z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2
        y = y + dense(z, p["mlp"]["dense_1"])
    return dense(normed(y, params["layer_norm"])[:, 0], params["head"])


def test_vit_is_the_papers(x64):
    net = nn.vit(3, patch=2, layers=2, heads=2, features=4, dtype=jnp.float64)
    x = jax.random.normal(KEY, (2, 4, 6, 3), jnp.float64)
    params = jax.jit(net.init)(KEY, x)
    assert params["position_embedding"]["embedding"].shape == (7, 4)
    assert not params["head"]["kernel"].any()  # the paper's: logits are 0 at first
    params = moved(params)
    by_hand = vit_by_hand(jax.tree.map(np.asarray, params), np.asarray(x), 2, 2, 2)
    loss = lambda p: jnp.sum(jnp.sin(net.apply(p, x)))
    y, ours, theirs = jax.jit(lambda p: (net.apply(p, x), fbprop.grad(loss)(p), jax.grad(loss)(p)))(
        params)
    np.testing.assert_allclose(y, by_hand, rtol=1e-10)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_vit_b_has_86_million_parameters():
    net = nn.vit(1000, patch=16, layers=12, heads=12, features=768)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(lambda: net.init(KEY, images))
    assert nn.count_parameters(params) == 86_567_656  # of torchvision's vit_b_16


def test_vit_says_what_images_it_takes():
    net = nn.vit(3, patch=2, layers=1, heads=2, features=4)
    params = jax.eval_shape(lambda: net.init(KEY, jnp.ones((1, 4, 4, 1))))
    given = lambda *shape: jax.eval_shape(net.apply, params, jnp.ones(shape))
    with pytest.raises(ValueError, match=r"patch=2 .* got images of 4 x 5 expected"):
        given(1, 4, 5, 1)
    with pytest.raises(ValueError, match=r"images of one size, got 6 squares expected 4"):
        given(1, 4, 6, 1)
    with pytest.raises(ValueError, match=r"'patches' takes a batch with channels last"):
        given(4, 4, 1)


def test_autoencoder_is_two_networks():
    net = nn.autoencoder(12, 7, 2, activation=nn.tanh)
    x = jax.random.normal(KEY, (3, 2, 6, 1))
    params = moved(jax.jit(net.init)(KEY, x))
    shapes = {part: [p["kernel"].shape for p in params[part].values()] for part in params}
    assert shapes == {"encoder": [(12, 7), (7, 2)], "decoder": [(2, 7), (7, 12)]}
    encode, decode = net.parts
    code = encode.apply(params["encoder"], x)
    layers = jax.tree.map(np.asarray, [*params["encoder"].values(), *params["decoder"].values()])
    h = np.tanh(dense(np.asarray(x).reshape(3, 12), layers[0]))
    by_hand = dense(h, layers[1])
    np.testing.assert_allclose(code, by_hand, rtol=1e-5)
    by_hand = dense(np.tanh(dense(by_hand, layers[2])), layers[3])
    np.testing.assert_allclose(decode.apply(params["decoder"], code), by_hand, rtol=1e-5)
    np.testing.assert_allclose(net.apply(params, x), by_hand, rtol=1e-5)
    loss = lambda p: jnp.mean((net.apply(p, x) - x.reshape(3, 12))**2)
    ours, theirs = jax.jit(lambda p: (fbprop.grad(loss)(p), jax.grad(loss)(p)))(params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_vae_draws_in_training_only():
    net = nn.vae(12, 7, 2)
    x = jax.random.uniform(KEY, (3, 12))
    params = moved(jax.jit(net.init)(KEY, x))
    encode, decode = net.parts
    mean, log_variance = np.split(np.asarray(encode.apply(params["encoder"], x)), 2, axis=-1)
    out = net.apply(params, x)
    np.testing.assert_allclose(out.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(out.log_variance, log_variance, rtol=1e-6)
    np.testing.assert_allclose(out.logits, decode.apply(params["decoder"], mean), rtol=1e-5)
    drawn = net.apply(params, x, key=KEY, train=True)
    z = mean + np.exp(log_variance / 2) * jax.random.normal(KEY, mean.shape)
    np.testing.assert_allclose(drawn.logits, decode.apply(params["decoder"], z), rtol=1e-5)

    def loss(p):
        out = net.apply(p, x, key=KEY, train=True)
        given = jnp.sum(ops.sigmoid_cross_entropy(out.logits, x), -1)
        return jnp.mean(given + nn.normal_divergence(out.mean, out.log_variance))

    ours, theirs = jax.jit(lambda p: (fbprop.grad(loss)(p), jax.grad(loss)(p)))(params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'vae' draws random .* got key=None with train=True"):
        net.apply(params, x, train=True)


def test_divergence_is_the_mean_log_ratio(x64):
    mean, log_variance = jnp.array([0.7, -1.1]), jnp.array([-0.4, 0.9])
    z, h = np.linspace(-30, 30, 200_001, retstep=True)
    by_sum = 0.0
    for m, v in zip(np.asarray(mean), np.exp(np.asarray(log_variance))):
        log_q = -(z - m)**2 / (2 * v) - np.log(2 * np.pi * v) / 2
        by_sum += np.sum(np.exp(log_q) * (log_q + z**2 / 2 + np.log(2 * np.pi) / 2)) * h
    assert nn.normal_divergence(mean, log_variance).item() == pytest.approx(by_sum, rel=1e-10)
    assert nn.normal_divergence(jnp.zeros((3, 2)), jnp.zeros((3, 2))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("make", [nn.autoencoder, nn.vae])
def test_sizes_of_input_and_code(make):
    with pytest.raises(ValueError, match=r"sizes of its input and of its code, got \(3,\) exp"):
        make(3)
    with pytest.raises(ValueError, match=r"of 5 numbers each, got an input of shape \(2, 3\) exp"):
        make(5, 4, 2).init(KEY, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"of 5 numbers each, got an input of shape \(5,\) exp"):
        make(5, 4, 2).init(KEY, jnp.ones(5))
