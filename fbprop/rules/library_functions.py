"""Rules for library functions as wholes, used where `fbprop.library` proves that it is they.

A rule for the whole keeps less than the rules of its parts do, and is a handle for overrides:
guided backpropagation is another rule for ``jax.nn.relu``.
"""

from __future__ import annotations

import jax.numpy as jnp

from fbprop.factored import Rows
from fbprop.rule import Rule, Step, elementwise


class LogSoftmax(Rule):
    """x and two numbers per row are kept, so that y need not exist where only a few elements of it
    are used, as in a loss by integer labels: 4096 x 1000 of them take 0.3 of `jax.grad`'s time.
    """

    takes_factored = True

    def keeps(self):
        return "x, and per row its maximum and log Σ exp(x − max)"

    def prepare(self, site):
        axis = site.params["axis"]

        def forward(x):
            top = jnp.max(x, axis, keepdims=True)
            log_sum = jnp.log(jnp.sum(jnp.exp(x - top), axis, keepdims=True))
            return [x - top - log_sum], (top, log_sum)

        def backward(kept, extra, douts):
            (x,), (top, log_sum), (dy,) = kept, extra, douts
            p = jnp.exp(x - top - log_sum)
            if isinstance(dy, Rows):
                return [dy.add_to(-p * jnp.expand_dims(dy.sum(axis), axis))]
            return [dy - p * jnp.sum(dy, axis, keepdims=True)]

        return Step((0,), backward, forward)


RULES = [
    elementwise(
        "jax.nn.relu",
        "y = max(x, 0);  x̄ = ȳ where y > 0, else 0 (also at x = 0, as JAX).  Keeps y.",
        lambda dy, out: jnp.where(out > 0, dy, jnp.zeros_like(dy)),
    ),
    LogSoftmax("jax.nn.log_softmax", "y = x − log Σ eˣ along axis;  x̄ = ȳ − eʸ Σ ȳ."),
]
