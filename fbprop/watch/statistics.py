"""Statistics of an array that a report holds: each a function from an array to a small one.

Sums of 16-bit numbers are made in float32. A function of one's own is as good.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fbprop.watch.factors import wide


def norm(x: jax.Array) -> jax.Array:
    """√Σ|x|², float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import watch
      >>> float(watch.norm(jnp.array([3.0, -4.0])))
      5.0
    """
    return jnp.sqrt(jnp.sum(jnp.square(wide(jnp.abs(x)))))


def max_abs(x: jax.Array) -> jax.Array:
    """max |x|, nan if there is one; 0 of no elements.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import watch
      >>> float(watch.max_abs(jnp.array([3.0, -4.0])))
      4.0
    """
    return nan_kept(x, jnp.max(jnp.abs(x), initial=0))


def nan_kept(x, extreme):
    """A largest or smallest number of x, or nan if x has one.

    XLA's for CPUs (jaxlib 0.10.2, 0.12.0) passes over nan among some thousand elements.
    """
    return jnp.where(jnp.any(jnp.isnan(x)), jnp.full_like(extreme, jnp.nan), extreme)


def zeros(x: jax.Array) -> jax.Array:
    """The share of elements that are 0, float32: of a rectifier's result those that are off.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import watch
      >>> float(watch.zeros(jnp.array([0.0, 2.0, 0.0, 1.0])))
      0.5
    """
    return _share(x == 0)


def finite(x: jax.Array) -> jax.Array:
    """The share of elements that are finite, float32: 1 if there is neither nan nor infinity.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import watch
      >>> float(watch.finite(jnp.array([0.0, jnp.inf])))
      0.5
    """
    return _share(jnp.isfinite(x))


def _share(truths):
    return jnp.sum(truths, dtype="float32") / max(truths.size, 1)
