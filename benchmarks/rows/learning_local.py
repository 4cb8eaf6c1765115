"""Directions of learning rules that see one layer at a time, against one gradient.

As in `benchmarks.rows.learning`. What settles is held to a gradient through all of its steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.rows.elementwise import cross_entropy
from benchmarks.rows.learning import MLP, deep_problem, register
from benchmarks.rows.per_example import mlp_problem
from fbprop import learning


def layer(activation):
    return lambda p, h: activation(h @ p[0] + p[1])


RELU = [layer(jax.nn.relu)] * 2 + [layer(lambda z: z)]
TANH = [layer(jnp.tanh)] * 16 + [layer(lambda z: z)]
METHODS = {
    "greedy": lambda layers: learning.greedy(layers, cross_entropy, 10),
    "forward_forward": lambda layers: learning.forward_forward(layers, 10),
    "pepita": lambda layers: learning.pepita(layers, cross_entropy),
    "target": lambda layers: learning.difference_target_propagation(layers, cross_entropy),
    "target_direct": lambda layers: learning.difference_reconstruction(layers, cross_entropy),
    "target_chain": lambda layers: learning.difference_reconstruction(
        layers, cross_entropy, direct=False),
    "predictive": lambda layers: learning.predictive_coding(layers, cross_entropy, steps=10),
}
for _rule, _method in METHODS.items():
    register(f"mlp_{_rule}", lambda method=_method: method(RELU), mlp_problem, *MLP)
for _rule in ("greedy", "pepita"):
    register(f"deep_{_rule}", lambda method=METHODS[_rule]: method(TANH), deep_problem,
             [(3, 5)], [(256, 128)], [(1024, 256)])


def energy(params, s, x):
    hidden, out = s
    squares = 0.5 * (jnp.sum(hidden**2) + jnp.sum(out**2))
    up = jnp.sum(jnp.tanh(hidden) * (x @ params["in"]))
    return squares - up - jnp.sum(jnp.tanh(hidden) @ params["out"] * jnp.tanh(out))


def states(x):
    return jnp.zeros((len(x), 100)), jnp.zeros((len(x), 10))


def nudge(s, y):
    return jnp.mean(jnp.sum((s[1] - y) ** 2, -1))


def energy_problem(draw, B):
    """64-100-10, connected both ways, at rest after 50 steps."""
    params = {"in": draw.weight(64, 100), "out": draw.weight(100, 10)}

    def loss(params, x, y):
        return nudge(learning.settle(energy, params, states(x), x, steps=50), y)

    return loss, params, (draw.normal(B, 64), draw.normal(B, 10))


register(
    "settling_equilibrium",
    lambda: learning.equilibrium_propagation(energy, nudge, states, steps=(50, 10)),
    energy_problem, *MLP,
)
