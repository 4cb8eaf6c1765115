"""The type in which 16-bit numbers add up: a sum of many needs more than 8 or 11 bits."""

import jax.numpy as jnp


def wide_dtype(dtype):
    """float32 for the 16-bit floating types, otherwise the type itself."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else jnp.dtype(dtype)


def at_least_float32(x):
    """``x``, in float32 if it is of 16 bits."""
    return x.astype(wide_dtype(x.dtype))
