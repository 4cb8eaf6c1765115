"""What an optimiser's update costs, jitted and donated, next to Optax's."""

import jax
import jax.numpy as jnp

from benchmarks.adam import adam_of, initial_moments
from benchmarks.row import Row, row


@row("update", smoke=[(3, 5)], small=[(100, 1_000), (3000, 10)],
     full=[(100, 100_000), (3000, 100)])
def adam_update(draw, L, N):
    """Adam on L leaves of N parameters."""
    params = [draw.normal(N) for _ in range(L)]
    gradient = [draw.normal(N) for _ in range(L)]

    def build(ad):
        adam = adam_of(ad, params)

        def run(carry, gradient):
            params, moments = carry
            scaled, moments = adam(gradient, moments, params)
            params = jax.tree.map(lambda p, s: p - 1e-3 * s, params, scaled)
            return (params, moments), jnp.zeros(())

        return run

    carry = params, initial_moments(params)
    return Row(build, (carry, gradient), carries=True, bytes=7 * 4 * L * N)
