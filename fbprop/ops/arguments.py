"""Checks that several operations share."""

import jax.numpy as jnp


def floating(name: str, x):
    """``x`` as an array; raises TypeError unless it is of floating numbers."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} takes floating numbers, got {x.dtype.name}: cast the input.")
    return x
