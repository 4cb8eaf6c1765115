"""A step of K-FAC on an autoencoder: factors by `fbprop.watch.curvature`, against by hand.

By hand: the network is written with its layers' inputs as results and a zero added to every layer's
sums, whose cotangents are the other factors. The optimiser is fbprop's in both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.row import Row, row
from benchmarks.rows.steps import dense_layers, mlp
from fbprop import optim
from fbprop.watch import curvature
from fbprop.watch.kronecker import Block, Kronecker

RATE, DAMPING, EVERY = 0.1, 0.1, 5


def squared_error(outputs, images):
    """Mean over images of half the squared distance."""
    return jnp.mean(jnp.sum((outputs - images) ** 2, -1)) / 2


def autoencoder_loss(params, images):
    return squared_error(mlp(params, images, jnp.tanh), images)


def by_ggn(params, images, key):
    """Kronecker factors from one sweep with random signs."""
    factors = curvature.ggn(
        lambda params, images: mlp(params, images, jnp.tanh), squared_error, "kronecker",
        samples=1, root=lambda output, image, z: z)
    return factors(params, images, images, key=key)


def by_hand(params, images, key):
    """The same by plain JAX."""
    def tapped(taps):
        inputs, x = [], images
        for i, ((w, b), tap) in enumerate(zip(params, taps)):
            inputs.append(x)
            x = x @ w + b + tap
            x = jnp.tanh(x) if i < len(params) - 1 else x
        return x, inputs

    taps = [jnp.zeros((len(images), w.shape[1]), w.dtype) for w, _ in params]
    outputs, pullback, inputs = jax.vjp(tapped, taps, has_aux=True)
    signs = jax.random.rademacher(key, (1, *outputs.shape), outputs.dtype)[0]
    factors = []
    for x, y, (w, b) in zip(inputs, pullback(signs)[0], params):
        a, g = x.T @ x / len(x), y.T @ y / len(y)
        factors.append((Kronecker(a, g, ((0,), (1,)), w.shape, 1), Block(g, b.shape)))
    return factors


@row("curvature", smoke=[(3, 7, 8)], small=[(128, 64, 100)],
     full=[(1437, 64, 100), (256, 784, 512)])
def autoencoder_kfac(draw, B, D, H):
    sizes = D, H, H // 2, max(H // 8, 2), H // 2, H, D
    params, images = dense_layers(draw, *sizes), draw.normal(B, D)
    optimizer = optim.kfac(
        RATE, by_ggn(params, images, jax.random.key(0)), damping=DAMPING, every=EVERY, clip=1.0)

    def build(ad):
        factors = by_ggn if ad is fbprop else by_hand

        def step(state, batch):
            params, state = state
            count = state[0].count
            value, gradient = ad.value_and_grad(autoencoder_loss)(params, *batch)
            now = factors(params, *batch, jax.random.fold_in(jax.random.key(1), count))
            updates, state = optimizer.update(gradient, state, params, factors=now)
            return (optim.apply_updates(params, updates), state), value

        return step

    # Curvature is squares of sums in another order, through inverses.
    return Row(build, ((params, optimizer.init(params)), (images,)), tolerance=1e-3, carries=True,
               loss=autoencoder_loss)
