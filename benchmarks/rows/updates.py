"""What an optimiser's update costs, jitted and donated, next to Optax's."""

import jax
import jax.numpy as jnp

import fbprop
from benchmarks.adam import scale_by_adam
from benchmarks.row import Row, row


def _in_order(state):
    """The leaves of a state, moments first: the two libraries' states hold the same arrays."""
    leaves = jax.tree.leaves(state)
    return [x for x in leaves if x.ndim] + [x for x in leaves if not x.ndim]


def _restored(leaves, state):
    """`_in_order` undone: the state whose form is that of ``state``."""
    moments, scalars = iter([x for x in leaves if x.ndim]), iter([x for x in leaves if not x.ndim])
    return jax.tree.map(lambda like: next(moments if like.ndim else scalars), state)


@row("update", smoke=[(3, 5)], small=[(100, 1_000), (3000, 10)],
     full=[(100, 100_000), (3000, 100)])
def adam_update(draw, L, N):
    """Adam on L leaves of N parameters."""
    params = [draw.normal(N) for _ in range(L)]
    gradient = [draw.normal(N) for _ in range(L)]

    def build(ad):
        optimizer = fbprop.optim.scale_by_adam() if ad is fbprop else scale_by_adam()
        form = jax.eval_shape(optimizer.init, params)

        def run(carry, gradient):
            params, leaves = carry
            scaled, state = optimizer.update(gradient, _restored(leaves, form), params)
            params = jax.tree.map(lambda p, s: p - 1e-3 * s, params, scaled)
            return (params, _in_order(state)), jnp.zeros(())

        return run

    state = _in_order(fbprop.optim.scale_by_adam().init(params))
    return Row(build, ((params, state), gradient), carries=True, bytes=7 * 4 * L * N)
