"""`jax.checkpoint` where it is used: read the memory column, for less memory is why."""

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.row import loss_gradient, row

SIZES = {"smoke": [(3, 5, 8)], "small": [(16, 64, 64)], "full": [(16, 256, 128)]}
DEEP_SUM = 1e-4  # gradients of 16 blocks in float32, summed in another order


def block(x, p):
    """Normalisation and two layers around a residual."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    normal = centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    return x + jnp.tanh(normal @ p["w"] + p["b"]) @ p["v"]


def stack(draw, L, D):
    """Parameters of L blocks, the layers along the first axis."""
    w, v = draw.weight(D, L * 4 * D), draw.weight(4 * D, L * D)
    return {
        "w": jnp.moveaxis(w.reshape(D, L, 4 * D), 1, 0), "b": draw.normal(L, 4 * D, scale=0.1),
        "v": jnp.moveaxis(v.reshape(4 * D, L, D), 1, 0),
    }


def depth(x, params, step=block):
    return lax.scan(lambda x, p: (step(x, p), None), x, params)[0]


def _row(draw, L, B, D, network, params=None):
    loss = lambda params, x: jnp.mean(network(x, params) ** 2)
    params = stack(draw, L, D) if params is None else params
    return loss_gradient(loss, params, [draw.normal(B, D)], tolerance=DEEP_SUM)


@row("gradient", **SIZES)
def checkpoint_in_scan(draw, L, B, D):
    """Layers in a loop, each computed again."""
    return _row(draw, L, B, D, lambda x, params: depth(x, params, jax.checkpoint(block)))


@row("gradient", **SIZES)
def checkpoint_in_scan_shared(draw, L, B, D):
    """One layer L times: its weights' gradients are sums over the steps."""
    params = jax.tree.map(lambda p: p[0], stack(draw, 1, D))
    step = jax.checkpoint(block)
    network = lambda x, p: lax.scan(lambda x, _: (step(x, p), None), x, None, length=L)[0]
    return _row(draw, L, B, D, network, params)


@row("gradient", **SIZES)
def checkpoint_of_scan(draw, L, B, D):
    return _row(draw, L, B, D, jax.checkpoint(depth))


@row("gradient", **SIZES)
def checkpoint_of_segments(draw, L, B, D):
    """Four segments of layers, in loops: of the square-root kind (Chen et al. 2016)."""
    def network(x, params):
        segments = jax.tree.map(lambda p: p.reshape(-1, max(L // 4, 1), *p.shape[1:]), params)
        return depth(x, segments, jax.checkpoint(depth))

    return _row(draw, L, B, D, network)


@row("gradient", **SIZES)
def checkpoint_layers(draw, L, B, D):
    """Layers in a Python loop, each computed again."""
    layers = stack(draw, L, D)

    def network(x, layers):
        for p in layers:
            x = jax.checkpoint(block)(x, p)
        return x

    return _row(draw, L, B, D, network, [jax.tree.map(lambda p: p[i], layers) for i in range(L)])
