"""Values to compute from a second time, tied to the cotangents; here it is chosen how.

XLA compiles both sweeps as one. Untied it finds that the second computation is the first one, and
keeps everything after all. A barrier is enough, but for the compiler for CPUs of jaxlib 0.10, which
removes it first: there a few operands are held (`fbprop.core.opaque`). Six blocks of
attention in a Python loop take 0.35 of `jax.grad`'s memory with it, 0.85 without.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fbprop.core import jaxcompat as jc
from fbprop.core.opaque import held, is_number_in_trace

# The numbers of the first operand in another shape: there is nothing to compute.
VIEWS = frozenset(
    ("broadcast_in_dim", "expand_dims", "name", "reshape", "squeeze", "tap", "transpose")
)


class Tie:
    """Ties the inputs of a jaxpr of which some equations are computed a second time.

    Args:
      jaxpr: the jaxpr; eqns: these equations, in order.
      tied: per input, whether the user wants it tied (``prevent_cse``).
      hold: whether XLA would merge the two computations, if it saw no barrier.
    """

    def __init__(self, jaxpr, eqns, tied, hold):
        self.tied = tied
        hold = hold and any(tied) and not jc.cpu_respects_barriers()
        self.held = _held_inputs(jc.open_jaxpr(jaxpr).invars, eqns, tied) if hold else []

    def __call__(self, operands, saved, cotangents):
        """The same operands (None for one that is not needed), saved values and cotangents."""
        if not any(self.tied):
            return operands, saved, cotangents
        some = [x for x, t in zip(operands, self.tied) if t]
        some, saved, cotangents = jc.behind_barrier((some, saved, cotangents))
        some = iter(some)
        operands = [next(some) if t else x for x, t in zip(operands, self.tied)]
        traced = [d for d in jax.tree.leaves(cotangents) if is_number_in_trace(d)]
        for i in self.held if traced else ():
            operands[i] = held(operands[i], traced[0])
        return operands, saved, cotangents


def _held_inputs(invars, eqns, tied):
    """Indices of inputs such that every equation depends on one: few, and the smallest that do.

    A held operand of a product is copied, so no weight is held where an activation is there.
    """
    index = {v: i for i, v in enumerate(invars)}
    inputs = {v: [v] for v, t in zip(invars, tied) if t and _can_be_held(v.aval)}
    dependent = {}
    for eqn in eqns:
        operands = [v for v in eqn.invars if jc.is_var(v)]
        if eqn.primitive.name in VIEWS:
            operands = operands[:1]
        possible = [source for v in operands for source in inputs.get(v, ())]
        if any(v in dependent for v in operands):
            dependent.update(dict.fromkeys(eqn.outvars))
        elif eqn.primitive.name in VIEWS:
            inputs[eqn.outvars[0]] = possible
        elif possible:
            dependent[min(possible, key=lambda v: jc.nbytes(v.aval))] = None
            dependent.update(dict.fromkeys(eqn.outvars))
    return [index[v] for v in dependent if v in index]


def _can_be_held(aval):
    kinds = jnp.number, jnp.bool_, jax.dtypes.prng_key
    return any(jnp.issubdtype(aval.dtype, k) for k in kinds)
