"""A training step around a loss of a JAX library: its gradient by JAX, Adam by Optax."""

from __future__ import annotations

import jax
import optax


def trained(loss, params, batch, transform=jax.value_and_grad):
    """A function that does one jitted, donating Adam step and returns the loss before it."""
    adam = optax.adam(1e-3)

    @jax.jit(donate_argnums=(0, 1))
    def step(params, moments, batch):
        value, gradient = transform(loss)(params, *batch)
        updates, moments = adam.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    params = jax.tree.map(lambda x: x.copy(), params)
    state = [params, adam.init(params)]

    def run():
        *state[:], value = jax.block_until_ready(step(*state, batch))
        return float(value)

    return run
