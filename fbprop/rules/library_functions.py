"""Rules for library functions as wholes, used where `fbprop.library` proves that it is they.

A rule for the whole keeps less than the rules of its parts do, and is a handle for overrides:
guided backpropagation is another rule for ``jax.nn.relu``.
"""

from __future__ import annotations

import jax.numpy as jnp

from fbprop.rule import elementwise


def _log_softmax(dy, out, *, axis):
    return dy - jnp.exp(out) * jnp.sum(dy, axis, keepdims=True)


RULES = [
    elementwise(
        "jax.nn.relu",
        "y = max(x, 0);  x̄ = ȳ where y > 0, else 0 (also at x = 0, as JAX).  Keeps y.",
        lambda dy, out: jnp.where(out > 0, dy, jnp.zeros_like(dy)),
    ),
    elementwise(
        "jax.nn.log_softmax",
        "y = x − log Σ eˣ along axis;  x̄ = ȳ − eʸ Σ ȳ.  Keeps y.",
        _log_softmax,
    ),
]
