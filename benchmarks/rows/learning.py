"""Directions of other learning rules against one gradient, of the same network and batch.

The other program's result is another by design, so both return the loss, and what else they
compute times 0. The deep network has 16 layers, of which direct feedback alignment keeps nothing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.row import Row, row
from benchmarks.rows.per_example import convnet_problem, lstm_problem, mlp_problem
from benchmarks.rows.steps import classification, dense_layers, mlp
from fbprop import learning


def deep_problem(draw, B, D):
    """16 layers of D, and one to 10 classes."""
    layers = dense_layers(draw, *[D] * 17, 10)
    tanh = functools.partial(mlp, activation=jnp.tanh)
    return classification(tanh), layers, (draw.normal(B, D), draw.integers(10, B))


def _direction(method, loss, params, batch):
    memory = method.init(jax.random.key(0), loss, params, *batch)

    def total(tree):
        return sum(jnp.sum(x) for x in jax.tree.leaves(tree))

    def build(ad):
        def run(params, memory, *batch):
            if ad is fbprop:
                found = method.value_and_grad(loss)(params, *batch, memory=memory)
                (value, direction), memory = found
                return value + 0 * total(direction)
            value, gradient = jax.value_and_grad(loss)(params, *batch)
            return value + 0 * total(gradient)

        return run

    return Row(build, (params, memory, *batch))


PROBLEMS = {
    "mlp": (mlp_problem, [(3,)], [(128,)], [(128,)]),
    "deep": (deep_problem, [(3, 5)], [(256, 128)], [(1024, 256)]),
    "convnet": (convnet_problem, [(2, 8, 1)], [(16, 28, 1)], [(64, 28, 1)]),
    "lstm": (lstm_problem, [(2, 3, 5)], [(8, 32, 64)], [(32, 128, 256)]),
}
RULES = {
    "feedback": (learning.feedback_alignment(), ("mlp", "deep", "convnet", "lstm")),
    "sign_symmetry": (learning.sign_symmetry(), ("mlp",)),
    "kolen_pollack": (learning.kolen_pollack(), ("mlp",)),
    "weight_mirror": (learning.weight_mirror(), ("mlp",)),
    "product_feedback": (learning.product_feedback(), ("mlp",)),
    "direct": (learning.direct_feedback_alignment(), ("mlp", "deep", "convnet")),
    "direct_again": (learning.direct_feedback_alignment(recompute=True), ("mlp", "deep")),
    "direct_kolen_pollack": (learning.direct_kolen_pollack(0.1), ("mlp",)),
}


def _register(name, rule, problem, smoke, small, full):
    method = RULES[rule][0]

    @functools.wraps(problem)
    def make(draw, *dims):
        return _direction(method, *problem(draw, *dims))

    make.__name__ = name
    row("gradient", smoke=smoke, small=small, full=full)(make)


for _rule, (_, _names) in RULES.items():
    for _name in _names:
        _register(f"{_name}_{_rule}_direction", _rule, *PROBLEMS[_name])
