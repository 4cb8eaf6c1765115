"""Per-example norms and clipped sums, against `jax.vmap` of `jax.grad`, and one plain gradient.

The other program of `..._norms` and `..._clipped` forms every example's gradient. That of
`..._against_one` is one gradient of the whole batch: less work and another result, so that both
return the loss, and what else they compute times 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.row import Row, named, row
from benchmarks.rows.elementwise import cross_entropy
from benchmarks.rows.image_steps import convnet, convnet_params
from benchmarks.rows.recurrent import lstm_layer, recurrent_weights
from benchmarks.rows.sequence_steps import CHARACTERS, gpt_loss, gpt_params
from benchmarks.rows.steps import SIZES, classification, dense_layers, mlp
from fbprop.watch import per_example

BOUND = 1.0


def mlp_problem(draw, B):
    """(loss, parameters, batch) of 784-512-256-10."""
    batch = draw.normal(B, 784), draw.integers(10, B)
    return classification(mlp), dense_layers(draw, *SIZES), batch


def convnet_problem(draw, B, H, C):
    batch = draw.normal(B, H, H, C), draw.integers(10, B)
    return classification(convnet), convnet_params(draw, H, C), batch


def gpt_problem(draw, B, T, L, D, V):
    return gpt_loss(4), gpt_params(draw, L, T, D, V), (draw.integers(V, B, T + 1),)


def lstm_problem(draw, B, T, H):
    params = {"embedding": draw.normal(CHARACTERS, H), "head": dense_layers(draw, H, CHARACTERS),
              "cell": recurrent_weights(draw, 4, H, H)}

    def loss(params, tokens):
        tokens = tokens.T
        xs = params["embedding"][tokens[:-1]]
        return cross_entropy(mlp(params["head"], lstm_layer(*params["cell"], xs)), tokens[1:])

    return loss, params, (draw.integers(CHARACTERS, B, T + 1),)


def gradients(loss, params, batch):
    """Every example's gradient, by JAX."""
    def one(params, *example):
        return loss(params, *(x[None] for x in example))

    return jax.vmap(jax.grad(one), (None, *(0 for _ in batch)))(params, *batch)


def norms_of(found):
    """Norms [B] of gradients with the batch in front."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g), range(1, g.ndim)) for g in jax.tree.leaves(found)))


def _norms(loss, params, batch, **figures):
    def build(ad):
        if ad is fbprop:
            return lambda params, *batch: per_example.norms(loss)(params, *batch).total
        return lambda params, *batch: norms_of(gradients(loss, params, batch))

    return Row(build, (params, *batch), **{"tolerance": 1e-4, **figures})


def _clipped(loss, params, batch, **figures):
    def by_jax(params, *batch):
        found = gradients(loss, params, batch)
        scale = jnp.minimum(1.0, BOUND / norms_of(found))
        return jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), found)

    def build(ad):
        ours = per_example.clipped_sum(loss, BOUND)
        return (lambda *args: ours(*args).gradient) if ad is fbprop else by_jax

    return Row(build, (params, *batch), **{"tolerance": 1e-4, **figures})


def _against_one(ours, loss, params, batch, **figures):
    def build(ad):
        def run(params, *batch):
            if ad is fbprop:
                found = ours(loss)(params, *batch)
                return jnp.mean(found.values) + 0 * total(found)
            value, gradient = jax.value_and_grad(loss)(params, *batch)
            return value + 0 * total(gradient)

        return run

    def total(tree):
        return sum(jnp.sum(x) for x in jax.tree.leaves(tree))

    return Row(build, (params, *batch), **{"tolerance": 1e-4, **figures})


PROBLEMS = {
    "mlp": (mlp_problem, [(3,)], [(128,)], [(128,)]),
    "convnet": (convnet_problem, [(2, 8, 1)], [(16, 28, 1)], [(64, 28, 1)]),
    "gpt": (gpt_problem, [(2, 5, 1, 8, 11)], [(2, 64, 2, 64, 512)], [(8, 256, 4, 256, 8192)]),
    "lstm": (lstm_problem, [(2, 3, 5)], [(8, 32, 64)], [(32, 128, 256)]),
}
KINDS = {
    "norms": _norms,
    "clipped": _clipped,
    "norms_against_one": lambda *p: _against_one(per_example.norms, *p),
    "clipped_against_one": lambda *p: _against_one(
        lambda loss: per_example.clipped_sum(loss, BOUND), *p
    ),
}


def _register(name, problem, kind, smoke, small, full):
    make = lambda draw, *dims: KINDS[kind](*problem(draw, *dims))
    row("gradient", smoke=smoke, small=small, full=full)(named(f"{name}_{kind}", problem, make))


for _name, (_problem, *_sizes) in PROBLEMS.items():
    for _kind in KINDS:
        _register(_name, _problem, _kind, *_sizes)
