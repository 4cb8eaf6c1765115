"""Initial values of parameters, by their usual names.

They are `jax.nn.initializers`: ``glorot_uniform()`` and its kin return ``init(key, shape, dtype)``;
``zeros`` and ``ones`` are such functions themselves. Kernels have inputs second to last and outputs
last (``[..., in, out]``), which is what the fans are counted from:

====================  ==========================================  =========================
name                  variance                                    source
====================  ==========================================  =========================
glorot_*, xavier_*    2 / (fan_in + fan_out)                      Glorot & Bengio 2010
he_*, kaiming_*       2 / fan_in, for ReLU                        He et al. 2015
lecun_*               1 / fan_in                                  LeCun et al. 1998
orthogonal            1 / the longer side; columns orthonormal    Saxe et al. 2014
====================  ==========================================  =========================

Example:
  >>> import jax
  >>> from fbprop.nn import initializers
  >>> initializers.he_normal()(jax.random.key(0), (3, 3, 2, 5)).shape
  (3, 3, 2, 5)
"""

import functools

import jax.numpy as jnp
from jax.nn import initializers as _jax
from jax.nn.initializers import constant, normal, ones, truncated_normal, uniform, zeros

from fbprop.nn.shapes import wide_dtype


def _also_empty(make):
    """Initialisers of arrays without elements too, where JAX divides by the inputs or outputs."""

    @functools.wraps(make)
    def made(*args, **kwargs):
        init = make(*args, **kwargs)

        def of_any_shape(key, shape, *dtype, **options):
            return zeros(key, shape, *dtype) if 0 in shape else init(key, shape, *dtype, **options)

        return of_any_shape

    return made


variance_scaling = _also_empty(_jax.variance_scaling)
glorot_normal, glorot_uniform = map(_also_empty, (_jax.glorot_normal, _jax.glorot_uniform))
he_normal, he_uniform = map(_also_empty, (_jax.he_normal, _jax.he_uniform))
lecun_normal, lecun_uniform = map(_also_empty, (_jax.lecun_normal, _jax.lecun_uniform))
xavier_normal, xavier_uniform = glorot_normal, glorot_uniform
kaiming_normal, kaiming_uniform = he_normal, he_uniform

__all__ = [
    "constant", "glorot_normal", "glorot_uniform", "he_normal", "he_uniform", "kaiming_normal",
    "kaiming_uniform", "lecun_normal", "lecun_uniform", "normal", "ones", "orthogonal",
    "truncated_normal", "uniform", "variance_scaling", "xavier_normal", "xavier_uniform", "zeros",
]


def orthogonal(scale: float = 1.0, column_axis: int = -1):
    """`jax.nn.initializers.orthogonal`, in 16 bits too: decomposed in float32, then rounded.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop.nn import initializers
      >>> q = initializers.orthogonal()(jax.random.key(0), (5, 3))
      >>> bool(jnp.allclose(q.T @ q, jnp.eye(3), atol=1e-6))
      True
    """
    make = _also_empty(_jax.orthogonal)(scale, column_axis)

    def init(key, shape, dtype=jnp.float32):
        return make(key, shape, wide_dtype(dtype)).astype(dtype)

    return init
