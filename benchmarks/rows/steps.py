"""Whole training steps: forward, backward and Adam; the smallest networks here, others beside.

fbprop's gradient and Adam against JAX's gradient and Optax's Adam. Gradients of tables are rows, as
in `fbprop.train.step`. The learning rate is an argument of the
measured program: agreement is checked with zero, where Adam's moments after one step or a whole
epoch are exact sums of gradients and their squares, on the program that is timed.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import lax

import fbprop
from benchmarks.adam import adam_of, initial_moments
from benchmarks.row import Row, chosen, row
from benchmarks.rows.elementwise import cross_entropy


def training_step(loss, params, batch, ours=None, **figures) -> Row:
    """One Adam step on ``loss(params, *batch)``, one dispatch; fbprop's on ``ours``, if given."""
    return _row(loss, params, batch, lambda step: step, figures, ours)


def training_epoch(loss, params, batches, **figures) -> Row:
    """Steps over the leading axis of the batches in one `lax.scan`, one dispatch."""
    def scanned(step):
        def epoch(state, batches, rate):
            return lax.scan(lambda state, batch: step(state, batch, rate), state, batches)

        return epoch

    return _row(loss, params, batches, scanned, figures)


def _row(loss, params, batch, wrap, figures, ours=None):
    def build(ad):
        adam = adam_of(ad, params)
        options = {"factored": fbprop.Rows} if ad is fbprop else {}

        def step(state, batch, rate):
            params, moments = state
            value, gradient = ad.value_and_grad(chosen(ad, loss, ours), **options)(params, *batch)
            updates, moments = adam(gradient, moments, params)
            params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates)
            return (params, moments), value

        return wrap(step)

    inputs = (params, initial_moments(params)), tuple(batch)
    # Moments hold squares of gradients, and sums over a batch are added up in another order.
    figures = {"tolerance": 1e-4, **figures}
    return Row(build, (*inputs, jnp.float32(1e-3)), probe=(*inputs, jnp.float32(0)), carries=True,
               loss=loss, **figures)


def dense_layers(draw, *sizes):
    """Parameters of dense layers: a list of (weight, bias)."""
    return [(draw.weight(m, n), jnp.zeros(n)) for m, n in itertools.pairwise(sizes)]


def mlp(params, x, activation=jax.nn.relu):
    """Dense layers with an activation between them."""
    *hidden, (w, b) = params
    for v, c in hidden:
        x = activation(x @ v + c)
    return x @ w + b


def classification(apply):
    """Cross-entropy of ``apply(params, x)`` against integer labels."""
    return lambda params, x, labels: cross_entropy(apply(params, x), labels)


SIZES = 784, 512, 256, 10
MLP_FLOPS = 6 * (784 * 512 + 512 * 256 + 256 * 10)  # per example


@row("step", smoke=[(3,)], small=[(128,)], full=[(128,)])
def mlp_step(draw, B):
    batch = draw.normal(B, 784), draw.integers(10, B)
    return training_step(classification(mlp), dense_layers(draw, *SIZES), batch,
                         flops=MLP_FLOPS * B)


@row("step", smoke=[(2, 3)], small=[(20, 128)], full=[(469, 128)])
def mlp_epoch(draw, K, B):
    batches = draw.normal(K, B, 784), draw.integers(10, K, B)
    return training_epoch(classification(mlp), dense_layers(draw, *SIZES), batches,
                          flops=MLP_FLOPS * B * K)
