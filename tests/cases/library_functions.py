"""Rows of rules/library_functions.py."""

import jax
import jax.numpy as jnp

from cases.case import Case, apart, positive, real

F64 = 8

def erf_gelu(x):
    return jax.nn.gelu(x, approximate=False)


CASES = [
    Case("jax.nn.relu", jax.nn.relu, (apart(2, 3),), at=(((0.0,), {0: 0.0}), ((0.5,), {0: 1.0}))),
    Case("jax.nn.log_softmax", jax.nn.log_softmax, (real(2, 3),), kept=(6 + 2 * 2) * F64),
    Case("jax.nn.log_softmax", lambda x: jax.nn.log_softmax(x, axis=0), (real(2, 3),), "axis 0",
         kept=(6 + 2 * 3) * F64),
    Case("jax.nn.gelu", jax.nn.gelu, (real(2, 3),), "tanh", at=(((0.0,), {0: 0.5}),)),
    Case("jax.nn.gelu", erf_gelu, (real(2, 3),), "erf", at=(((0.0,), {0: 0.5}),)),
    Case("jax.nn.gelu", erf_gelu, (real(3, scale=6),), "tails"),
    Case("jax.nn.silu", jax.nn.silu, (real(2, 3),), at=(((0.0,), {0: 0.5}),)),
    Case("jax.nn.log_sigmoid", jax.nn.log_sigmoid, (real(2, 3),), at=(((0.0,), {0: 0.5}),)),
    Case("jax.nn.softmax", jax.nn.softmax, (real(2, 3),)),
    Case("jax.nn.softmax", lambda x: jax.nn.softmax(x, axis=0), (real(2, 3),), "axis 0"),
    Case("jax.nn.softmax", lambda x: jax.nn.softmax(x, axis=(0, 2)), (real(2, 3, 5),), "two axes"),
    Case("jax.numpy.var", lambda x: jnp.var(x, axis=1), (real(2, 5),), kept=104),
    Case("jax.numpy.var", lambda x: jnp.var(x, axis=(0, 1), keepdims=True, ddof=1),
         (real(2, 5, 3),), "two axes", kept=272),
    Case("jax.numpy.var", jnp.var, (real(2, 5),), "all axes", kept=96),
    # Transposed: the cotangent, drawn as x is, would be in the direction of y, and x̄ vanish.
    Case("jax.nn.standardize", lambda x: jax.nn.standardize(x.T), (real(5, 2),),
         kept=(10 + 2 * 2) * F64),
    Case("jax.nn.standardize", lambda x: jax.nn.standardize(x, axis=(0, 1), epsilon=0.5),
         (real(2, 5, 3),), "two axes", kept=(30 + 2 * 3) * F64),
    Case("jax.numpy.hypot", jnp.hypot, (real(2, 3), real(3)),
         at=(((0.0, 0.0), {0: 0.5, 1: 0.5}), ((0.0, -4.0), {0: 0.0, 1: -1.0}))),
    Case("jax.numpy.logaddexp", jnp.logaddexp, (real(2, 3), real(3)),
         at=(((0.0, 0.0), {0: 0.5, 1: 0.5}),)),
    Case("jax.numpy.logaddexp2", jnp.logaddexp2, (real(2, 3), real(3)),
         at=(((0.0, 0.0), {0: 0.5, 1: 0.5}),)),
    Case("jax.scipy.special.xlogy", jax.scipy.special.xlogy, (real(2, 3), positive(3)),
         at=(((0.0, 2.0), {1: 0.0}), ((3.0, 1.0), {0: 0.0, 1: 3.0}))),
    Case("jax.scipy.special.xlog1py", jax.scipy.special.xlog1py, (real(2, 3), positive(3)),
         at=(((3.0, 0.0), {0: 0.0, 1: 3.0}),)),
]
