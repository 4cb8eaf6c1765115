"""Directions of other learning rules against one gradient, of the same network and batch.

The other program's result is another by design, so both return the loss, and what else they
compute, direction and what the memory has learned, times 0. The deep network has 16 layers, of
which direct feedback alignment keeps nothing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.row import Row, named, row
from benchmarks.rows.per_example import convnet_problem, lstm_problem, mlp_problem
from benchmarks.rows.steps import classification, dense_layers, mlp
from fbprop import learning

MLP = [(3,)], [(128,)], [(128,)]


def deep_problem(draw, B, D):
    """16 layers of D, and one to 10 classes."""
    layers = dense_layers(draw, *[D] * 17, 10)
    tanh = functools.partial(mlp, activation=jnp.tanh)
    return classification(tanh), layers, (draw.normal(B, D), draw.integers(10, B))


def direction(method, loss, params, batch) -> Row:
    """A row: this rule's direction, and JAX's gradient."""
    memory = method.init(jax.random.key(0), loss, params, *batch)

    def build(ad):
        def run(params, memory, *batch):
            if ad is fbprop:
                found = method.value_and_grad(loss)(params, *batch, memory=memory)
                (value, direction), new = found
                return value + 0 * total(direction) + 0 * total(learned(new, memory))
            value, gradient = jax.value_and_grad(loss)(params, *batch)
            return value + 0 * total(gradient)

        return run

    return Row(build, (params, memory, *batch))


def total(tree):
    return sum(jnp.sum(x) for x in jax.tree.leaves(tree))


def learned(new, old):
    """The arrays of a memory that are others than before; without random keys."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old))
    return [x for x, was in pairs if x is not was and jnp.issubdtype(x.dtype, jnp.floating)]


PROBLEMS = {
    "mlp": (mlp_problem, *MLP),
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
    "blended": (learning.blend(learning.feedback_alignment(), 0.5), ("mlp",)),
    "direct": (learning.direct_feedback_alignment(), ("mlp", "deep", "convnet")),
    "direct_again": (learning.direct_feedback_alignment(recompute=True), ("mlp", "deep")),
    "direct_kolen_pollack": (learning.direct_kolen_pollack(0.1), ("mlp",)),
    "forward": (learning.forward_gradient(), ("mlp", "deep")),
    "activity": (learning.activity_forward_gradient(), ("mlp", "deep")),
    "activity_each": (learning.activity_forward_gradient(per_example=(0, 1)), ("mlp",)),
    "evolution": (learning.evolution_strategy(samples=2), ("mlp",)),
}


def register(name, make_method, problem, smoke, small, full):
    """Put ``{name}_direction`` in the table; the method is made with the row."""
    def make(draw, *dims):
        return direction(make_method(), *problem(draw, *dims))

    row("gradient", smoke=smoke, small=small, full=full)(
        named(f"{name}_direction", problem, make))


for _rule, (_method, _names) in RULES.items():
    for _name in _names:
        register(f"{_name}_{_rule}", lambda method=_method: method, *PROBLEMS[_name])
