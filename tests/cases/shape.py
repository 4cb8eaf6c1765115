"""Rows of rules/shape.py."""

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lax.lax import tie_p  # in JAX's table of derivatives, but no function makes it yet
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from cases.case import Case, complex_, real
from fbprop.core.opaque import either, held, made_of
from fbprop.core.tap import tap

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
ROW_MAJOR = Layout((0, 1))


CASES = [
    Case("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (2, 3, 5), (1,)), (real(3),)),
    Case("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (2, 3, 5), (0, 2)),
         (real(1, 5),), "unit"),
    Case("broadcast_in_dim", lambda x: lax.expand_dims(x, (0, 2)), (real(2, 3),), "expand"),
    Case("broadcast_in_dim", lambda x: jnp.broadcast_to(x, (3, 2)), (complex_(),), "scalar",
         dtypes=("float32",)),
    Case("tile", lambda x: lax.tile(x, (3, 1, 2)), (real(2, 1, 5),)),
    Case("reshape", lambda x: lax.reshape(x, (3, 10)), (real(2, 3, 5),)),
    Case("reshape", lambda x: lax.reshape(x, (15, 2), (2, 0, 1)), (real(2, 3, 5),), "permuted"),
    Case("squeeze", lambda x: lax.squeeze(x, (0, 2)), (real(1, 3, 1, 2),)),
    Case("transpose", lambda x: lax.transpose(x, (2, 0, 1)), (real(2, 3, 5),)),
    Case("rev", lambda x: lax.rev(x, (0, 2)), (real(2, 3, 5),)),
    Case("slice", lambda x: x[1:3, 2:], (real(5, 7),)),
    Case("slice", lambda x: lax.slice(x, (1, 0), (5, 6), (2, 3)), (real(5, 7),), "strides"),
    Case("slice", lambda x: x[1:4], (complex_(5),), "complex", dtypes=("float32",)),
    Case("pad", lambda x, v: lax.pad(x, v, ((1, 2, 0), (0, 3, 0))), (real(2, 3), real())),
    Case("pad", lambda x, v: lax.pad(x, v, ((2, 1, 2), (0, 1, 1))), (real(2, 3), real()),
         "interior"),
    Case("pad", lambda x, v: lax.pad(x, v, ((-1, 2, 1), (3, -2, 2))), (real(5, 3), real()),
         "negative"),
    Case("pad", lambda x: lax.pad(x, jnp.ones((), x.dtype), ((2, 1, 0),)), (real(3),), "operand"),
    Case("concatenate", lambda a, b: lax.concatenate([a, b, a], 1), (real(2, 3), real(2, 5))),
    Case("concatenate", lambda a: jnp.concatenate([jnp.ones((2, 1), a.dtype), a], 1),
         (real(2, 3),), "constant"),
    Case("split", lambda x: lax.split(x, (1, 4, 2), 1), (real(3, 7),)),
    Case("split", lambda x: jnp.split(x, (2,), 0)[1], (real(5, 2),), "one"),
    Case("stack", lambda a, b: lax.stack([a, b, a], 1), (real(2, 3), real(2, 3))),
    Case("unstack", lambda x: lax.unstack(x, 1), (real(2, 3, 5),)),
    Case("unstack", lambda x: lax.unstack(x, 0)[1], (real(3, 2),), "one"),
    Case("name", lambda x: checkpoint_name(x, "x"), (real(2, 3),)),
    Case("either", lambda x: either(x, *[lax.stop_gradient(x)] * 2), (real(2, 3),)),
    Case("made_of", lambda x: made_of(x, lax.stop_gradient(x)), (real(2, 3),)),
    Case("hold", lambda x: held(x, jnp.ones(5, x.dtype)), (real(2, 3),)),
    Case("tap", lambda x: tap(x, (), ()), (real(2, 3),)),
    Case("optimization_barrier", lambda x, y: lax.optimization_barrier((x, y)),
         (real(2, 3), real(5))),
    Case("optimization_barrier", lambda x: lax.optimization_barrier((x, jnp.arange(3)))[0],
         (real(2, 3),), "integers"),
    Case("device_put", lambda x, y: jax.device_put((x, y), jax.devices()[0]), (real(2), real(3))),
    Case("sharding_constraint", lambda x: lax.with_sharding_constraint(x, HERE), (real(2, 3),)),
    Case("layout_constraint", lambda x: with_layout_constraint(x, ROW_MAJOR), (real(2, 3),)),
    Case("tie", lambda x: tie_p.bind(jnp.sum(x), x), (real(2, 3),)),
    Case("reduce_precision", lambda x: lax.reduce_precision(x, 11, 52), (real(2, 3),)),
]
