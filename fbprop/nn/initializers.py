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
====================  ==========================================  =========================

Example:
  >>> import jax
  >>> from fbprop.nn import initializers
  >>> initializers.he_normal()(jax.random.key(0), (3, 3, 2, 5)).shape
  (3, 3, 2, 5)
"""

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
    orthogonal,
    truncated_normal,
    uniform,
    variance_scaling,
    zeros,
)

xavier_normal, xavier_uniform = glorot_normal, glorot_uniform
kaiming_normal, kaiming_uniform = he_normal, he_uniform

__all__ = [
    "constant", "glorot_normal", "glorot_uniform", "he_normal", "he_uniform", "kaiming_normal",
    "kaiming_uniform", "lecun_normal", "lecun_uniform", "normal", "ones", "orthogonal",
    "truncated_normal", "uniform", "variance_scaling", "xavier_normal", "xavier_uniform", "zeros",
]
