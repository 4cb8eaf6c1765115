"""CTC: `fbprop.ops.ctc_loss` against the same sums over paths in plain code."""

import jax
import jax.numpy as jnp
from jax import lax

import fbprop
from benchmarks.row import loss_gradient, row


def plain(params, labels):
    """Alignment by alignment in logarithms, blank 0, all frames and labels real."""
    log_p = jax.nn.log_softmax(params)
    B, N = labels.shape
    classes = jnp.zeros((B, 2 * N + 1), labels.dtype).at[:, 1::2].set(labels)
    log_p = jnp.take_along_axis(log_p, classes[:, None], axis=-1).swapaxes(0, 1)
    skips = jnp.pad((classes[:, 2:] != 0) & (classes[:, 2:] != classes[:, :-2]), ((0, 0), (2, 0)))
    least = -1e5  # as Optax: a number, for whose derivative there is one

    def step(a, now):
        one, two = (jnp.pad(a, ((0, 0), (i, 0)), constant_values=least)[:, :-i] for i in (1, 2))
        return now + jnp.logaddexp(jnp.logaddexp(a, one), jnp.where(skips, two, least)), None

    start = jnp.full(classes.shape, least, log_p.dtype).at[:, 0].set(0)
    last, _ = lax.scan(step, start, log_p)
    return -jnp.mean(jnp.logaddexp(last[:, -1], last[:, -2]))


def ours(params, labels):
    return jnp.mean(fbprop.ops.ctc_loss(params, labels))


@row(smoke=[(2, 5, 2, 4)], small=[(8, 50, 10, 29)], full=[(16, 400, 60, 29), (16, 200, 40, 1000)])
def ctc_loss(draw, B, T, N, K):
    labels = 1 + draw.integers(K - 1, B, N)
    # In float32 plain code is 3e-4 off its own float64 at T 400, ours 9e-6.
    return loss_gradient(plain, draw.normal(B, T, K), [labels], ours=ours, tolerance=5e-3)
