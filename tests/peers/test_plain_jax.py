"""Models in plain JAX, as people write them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from compare import assert_same_gradient, cast

KEY = jax.random.key(0)


def normal(i, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape) / max(shape[0], 1) ** 0.5


def vae():
    params = {"encode": normal(0, 7, 10), "decode": normal(1, 5, 7)}
    x, noise = jax.nn.sigmoid(normal(2, 3, 7)), normal(3, 3, 5)

    def loss(p, dtype):
        mean, log_variance = jnp.split(jnp.tanh(cast(x, dtype) @ p["encode"]), 2, axis=-1)
        z = mean + jnp.exp(log_variance / 2) * cast(noise, dtype)
        logits = z @ p["decode"]
        likelihood = jnp.sum(jax.nn.log_sigmoid(logits) * cast(x, dtype))
        divergence = -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance))
        return divergence - likelihood

    return loss, params


def graph_network():
    params = {"message": normal(0, 3, 3), "update": normal(1, 3, 3)}
    nodes = normal(2, 5, 3)
    senders, receivers = jnp.array([0, 1, 2, 3, 4, 0, 2]), jnp.array([1, 2, 3, 4, 0, 2, 0])

    def loss(p, dtype):
        h = cast(nodes, dtype)
        for _ in range(2):
            messages = jax.nn.relu(h[senders] @ p["message"])
            total = jax.ops.segment_sum(messages, receivers, num_segments=5)
            most = jax.ops.segment_max(messages, receivers, num_segments=5)
            h = jnp.tanh(h @ p["update"] + total + most)
        return jnp.sum(h**2)

    return loss, params


def neural_ode():
    params = {"w": normal(0, 4, 4), "x0": normal(1, 4)}

    def loss(p, dtype):
        field = lambda x: jnp.tanh(p["w"] @ x)
        dt = 0.1

        def runge_kutta(x, _):
            k1 = field(x)
            k2 = field(x + dt / 2 * k1)
            k3 = field(x + dt / 2 * k2)
            k4 = field(x + dt * k3)
            x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return x, x

        x, path = lax.scan(jax.checkpoint(runge_kutta), p["x0"], None, length=11)
        return jnp.sum(x**2) + jnp.mean(jnp.abs(path))

    return loss, params


def gaussian_process():
    params = {"length": jnp.asarray(0.3), "noise": jnp.asarray(-1.0), "scale": jnp.asarray(0.2)}
    x, y = jnp.linspace(0.0, 1.0, 7), normal(0, 7)

    def loss(p, dtype):
        xs, ys = cast(x, dtype), cast(y, dtype)
        distance = (xs[:, None] - xs[None]) ** 2
        kernel = jnp.exp(p["scale"] - distance / (2 * jnp.exp(p["length"]) ** 2))
        lower = jnp.linalg.cholesky(kernel + jnp.exp(p["noise"]) * jnp.eye(7, dtype=dtype))
        alpha = jax.scipy.linalg.cho_solve((lower, True), ys)
        return 0.5 * ys @ alpha + jnp.sum(jnp.log(jnp.diag(lower)))

    return loss, params


def fourier_filter():
    params = {"filter": normal(0, 9), "gain": jnp.asarray(1.5)}
    signal = normal(1, 2, 16)

    def loss(p, dtype):
        spectrum = jnp.fft.rfft(cast(signal, dtype)) * p["filter"]
        filtered = jnp.fft.irfft(spectrum * jnp.exp(1j * p["gain"]))
        return jnp.mean(jnp.abs(jnp.fft.fft(filtered)) ** 2) + jnp.sum(filtered**3)

    return loss, params


def transformer():
    d, heads, tokens = 8, 2, 5
    shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    params |= {"embed": normal(9, 11, d), "scale": jnp.ones(d)}
    batch = jax.random.randint(KEY, (2, tokens), 0, 11)

    def norm(x, scale):
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    def loss(p, dtype):
        x = p["embed"][batch]
        q, k, v = jnp.split(norm(x, p["scale"]) @ p["qkv"], 3, -1)
        split = lambda t: t.reshape(2, tokens, heads, d // heads).transpose(0, 2, 1, 3)
        q, k, v = map(split, (q, k, v))
        scores = q @ k.swapaxes(-1, -2) / (d / heads) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), scores, -jnp.inf)
        mixed = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(2, tokens, d)
        x = x + mixed @ p["out"]
        x = x + jax.nn.gelu(norm(x, p["scale"]) @ p["up"]) @ p["down"]
        log_p = jax.nn.log_softmax(norm(x, p["scale"]) @ p["embed"].T)
        return -jnp.mean(jnp.take_along_axis(log_p[:, :-1], batch[:, 1:, None], -1))

    return loss, params


MODELS = [vae, graph_network, neural_ode, gaussian_process, fourier_filter, transformer]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_plain_jax(model, dtype):
    with jax.enable_x64(True):
        loss, params = model()
        assert_same_gradient(lambda p: loss(p, dtype), cast(params, dtype), dtype)
