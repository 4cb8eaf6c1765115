"""kfac-jax's step on an autoencoder.

The constant rate, damping and momentum of the row; curvature at every step from one random sample,
inverses every `EVERY` steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kfac_jax
from kfac_jax._src import tag_graph_matcher

from benchmarks.rows.curvature import DAMPING, EVERY, RATE, squared_error
from benchmarks.rows.steps import mlp


def _evaluated(eqn, values):
    params = eqn.primitive.get_bind_params(eqn.params)
    out = eqn.primitive.bind(*values, **params)
    return out if isinstance(out, list) else [out]


# kfac-jax 0.0.8 expects a pair of what jax 0.10 has as one dict of parameters.
tag_graph_matcher.eval_jaxpr_eqn = _evaluated


def autoencoder_kfac(params, batch):
    step = stepper(params, batch[0])
    return lambda: float(step())


def stepper(params, images, damping=DAMPING, rate=RATE, clip=None):
    """A function that does one step and gives the loss before it."""
    def loss(params, images):
        outputs = mlp(params, images, jnp.tanh)
        kfac_jax.register_squared_error_loss(outputs, images, weight=0.5)
        return squared_error(outputs, images)

    constraint = {} if clip is None else {"norm_constraint": clip}
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss), l2_reg=0.0, num_burnin_steps=0, inverse_update_period=EVERY,
        learning_rate_schedule=lambda step: jnp.asarray(rate),
        momentum_schedule=lambda step: jnp.asarray(0.9),
        damping_schedule=lambda step: jnp.asarray(damping), curvature_ema=0.95, **constraint,
    )
    key = jax.random.key(1)
    params = jax.tree.map(jnp.copy, params)  # a step takes its arguments' memory
    state, count = optimizer.init(params, key, images), 0

    def step():
        nonlocal params, state, count
        params, state, stats = optimizer.step(
            params, state, jax.random.fold_in(key, count), batch=images, global_step_int=count)
        count += 1
        return jax.block_until_ready(stats["loss"])

    return step


