"""A truth that XLA cannot see: the way to say "this, but not before that" on every platform.

`jax.lax.optimization_barrier` says the same, but XLA's compiler for CPUs removes it before it looks
for common subexpressions and folds transposes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core import jaxcompat as jc


def is_number_in_trace(x) -> bool:
    """Whether `true_of` can be asked of a value, and need be: outside of a trace nothing is."""
    return isinstance(x, jax.core.Tracer) and x.size > 0 and jnp.issubdtype(x.dtype, jnp.inexact)


def true_of(x) -> jax.Array:
    """True, once there is an ``x``: whether its first number's last bit, once set, is set."""
    first = lax.squeeze(lax.slice(x, [0] * x.ndim, [1] * x.ndim), range(x.ndim))
    first = lax.real(first) if jnp.iscomplexobj(first) else first
    bits = lax.bitcast_convert_type(first, f"uint{jnp.finfo(first.dtype).bits}")
    return lax.ne(lax.bitwise_or(bits, lax.full_like(bits, 1)), lax.full_like(bits, 0))


def held(x, after):
    """``x``, to be had only when there is an ``after``; XLA fuses it into what reads it.

    As it is where it would vary over more axes of a mesh for it.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = held(jax.random.key_data(x), after)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    true = true_of(after)
    if jc.varying_axes(jax.typeof(true)) - jc.varying_axes(jax.typeof(x)):
        return x
    return lax.select(lax.broadcast(true, x.shape), x, lax.full_like(x, 0))
