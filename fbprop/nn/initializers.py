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

import jax.numpy as jnp
from jax.nn.initializers import (
    constant,
    glorot_normal,
    glorot_uniform,
    he_normal,
    he_uniform,
    lecun_normal,
    lecun_uniform,
    normal,
    ones,
    truncated_normal,
    uniform,
    variance_scaling,
    zeros,
)
from jax.nn.initializers import orthogonal as _orthogonal

from fbprop.core.precision import wide_dtype

xavier_normal, xavier_uniform = glorot_normal, glorot_uniform
kaiming_normal, kaiming_uniform = he_normal, he_uniform

__all__ = [
    "constant", "glorot_normal", "glorot_uniform", "he_normal", "he_uniform", "kaiming_normal",
    "kaiming_uniform", "lecun_normal", "lecun_uniform", "normal", "ones", "orthogonal",
    "truncated_normal", "uniform", "variance_scaling", "xavier_normal", "xavier_uniform", "zeros",
]


def made(initializer, key, shape, dtype):
    """``initializer(key, shape, dtype)``; of no elements, without asking: some divide by sizes."""
    return jnp.zeros(shape, dtype) if 0 in shape else initializer(key, shape, dtype)


def orthogonal(scale: float = 1.0, column_axis: int = -1):
    """`jax.nn.initializers.orthogonal`, in 16 bits too: decomposed in float32, then rounded.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop.nn import initializers
      >>> q = initializers.orthogonal()(jax.random.key(0), (5, 3))
      >>> bool(jnp.allclose(q.T @ q, jnp.eye(3), atol=1e-6))
      True
    """
    make = _orthogonal(scale, column_axis)

    def init(key, shape, dtype=jnp.float32):
        return make(key, shape, wide_dtype(dtype)).astype(dtype)

    return init
