"""Whether and how the backward sweep computes a value again, chosen when a program is lowered.

XLA compiles both sweeps as one, and would find that a value computed again is the one computed
before, and keep it after all. What it is computed from is `held` until there is a cotangent, and
the rule that asks for it gets `either` of the two. By evidence of `python -m benchmarks --target`
and of the CPU's rows (ratios to `jax.grad`):

* NVIDIA GPUs: again, by a way of their own (`fbprop.core.gpu_plan`), behind
  `jax.lax.optimization_barrier` of the value alone. ``resnet_step`` takes 0.62 of the temporary
  memory and moves 0.98 of the bytes; with nothing computed again 1.00 and 0.93. ``resnet50_step``
  moves 0.94 so, by the CPUs' way 0.97, and 1.17 if the barrier waits for the cotangent, too, which
  then has to be written.
* TPUs: the one computed before. There XLA computes again by itself what fits into what reads it:
  ``vit_step`` takes 1.00 of the memory so; when it took 1.16, it did 1.28 behind a barrier and
  2.70 behind the truth.
* CPUs: again, behind a truth that XLA cannot see; its compiler for CPUs removes barriers
  (jaxlib 0.10).
* In a program for several devices: the one computed before. A truth would have to be sent to all of
  them, and of parameters that they share out each computation gathers its own copy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fbprop.core import jaxcompat as jc

# For `fbprop.explain`: what becomes of a value that is not stored, on one device.
WAYS = {
    "cpu": "computed again, behind a truth that XLA cannot see",
    "cuda": "computed again, behind a barrier",
    "tpu": "left to XLA, which keeps them or computes them again",
}


def held(x, after):
    """``x``, to be had only when there is an ``after``; XLA fuses it into what reads it."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = held(jax.random.key_data(x), after)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return hold_p.bind(x, after)


def either(first, again, on_gpu):
    """``first``, or the same numbers computed ``again``, by another way ``on_gpu``."""
    return either_p.bind(first, again, on_gpu)


def made_of(x, again):
    """``x``, and how the backward sweep of a CPU may make it again: ``again``, cheap arithmetic.

    For a result that an operation computes, of which nobody else sees what it is made of. On a CPU
    the row ``resnet_network`` takes 0.47 of Flax's memory and 0.72 of its time with batch norm's y
    made so, 0.82 and 0.81 with y kept.
    """
    return made_of_p.bind(x, again)


def is_number_in_trace(x) -> bool:
    """Whether a value can be waited for, and need be: outside of a trace nothing is."""
    return isinstance(x, jax.core.Tracer) and x.size > 0 and jnp.issubdtype(x.dtype, jnp.inexact)


def _behind_truth(x, after):
    return lax.select(lax.broadcast(_true_of(after), x.shape), x, lax.full_like(x, 0))


def _true_of(x):
    """True, once there is an ``x``: whether its first number's last bit, once set, is set."""
    first = lax.squeeze(lax.slice(x, [0] * x.ndim, [1] * x.ndim), range(x.ndim))
    first = lax.real(first) if jnp.iscomplexobj(first) else first
    bits = lax.bitcast_convert_type(first, f"uint{jnp.finfo(first.dtype).bits}")
    return lax.ne(lax.bitwise_or(bits, lax.full_like(bits, 1)), lax.full_like(bits, 0))


def _behind_barrier(x, _):
    return lax.optimization_barrier(x)


def _lowered(alone, otherwise=lambda ctx, x, *_: [x]):
    return lambda ctx, *xs: (alone if jc.is_for_one_device(ctx) else otherwise)(ctx, *xs)


def _primitive(name):
    """A primitive that is its first operand, whatever the others are."""
    p = Primitive(name)
    p.def_impl(lambda x, *_: x)
    p.def_abstract_eval(lambda x, *_: x)
    ad.primitive_jvps[p] = lambda primals, tangents: (p.bind(*primals), tangents[0])
    ad.primitive_transposes[p] = lambda dy, *xs: (dy, *(None for _ in xs[1:]))
    mlir.register_lowering(p, lambda ctx, x, *_: [x])
    return p


def _batched_hold(args, dims):
    return hold_p.bind(*args), dims[0]


def _batched_alike(p):
    def batched(args, dims):
        size = next(x.shape[d] for x, d in zip(args, dims) if d is not None)
        return p.bind(*(batching.bdim_at_front(x, d, size) for x, d in zip(args, dims))), 0

    return batched


hold_p, either_p, made_of_p = map(_primitive, ("hold", "either", "made_of"))
batching.primitive_batchers[hold_p] = _batched_hold
batching.primitive_batchers[either_p] = _batched_alike(either_p)
batching.primitive_batchers[made_of_p] = _batched_alike(made_of_p)
BARRIER = mlir.lower_fun(_behind_barrier, multiple_results=False)
TRUTH = mlir.lower_fun(_behind_truth, multiple_results=False)
for platform, apart, chosen in (("cpu", TRUTH, 1), ("cuda", BARRIER, 2), ("rocm", BARRIER, 2)):
    mlir.register_lowering(hold_p, _lowered(apart), platform=platform)
    taken = lambda ctx, *xs, chosen=chosen: [xs[chosen]]
    mlir.register_lowering(either_p, _lowered(taken), platform=platform)
