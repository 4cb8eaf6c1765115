"""A training step around a loss of a JAX library: its gradient by JAX, Adam by Optax."""

from __future__ import annotations

import jax
import optax


def trained(loss, params, batch):
    """A function that does one jitted, donating Adam step and returns the loss before it."""
    return _loop(loss, params, [batch])


def trained_epoch(loss, params, batches):
    """A loop of such steps over the leading axis of the batches; the loss before the first one."""
    each = [jax.tree.map(lambda x: x[i], batches) for i in range(len(batches[0]))]
    return _loop(loss, params, each)


def _loop(loss, params, batches):
    adam = optax.adam(1e-3)

    @jax.jit(donate_argnums=(0, 1))
    def step(params, moments, batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, moments = adam.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    params = jax.tree.map(lambda x: x.copy(), params)
    state = [params, adam.init(params)]
    compiled = step.lower(*state, batches[0]).compile()

    def run():
        losses = []
        for batch in batches:
            *state[:], value = compiled(*state, batch)
            losses.append(value)
        jax.block_until_ready(state)
        return float(losses[0])

    run.temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    return run
