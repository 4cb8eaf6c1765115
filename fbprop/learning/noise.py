"""What noise in the place of a layer's input becomes: an estimate of its weight."""

from __future__ import annotations

import math
import zlib

import jax
import jax.numpy as jnp

from fbprop.core import jaxcompat as jc
from fbprop.learning.sweep import Loss
from fbprop.learning.trace import PRODUCTS, SHARDS, said
from fbprop.reverse import grad


def reflected(loss: Loss, leaves, methods, which, memories) -> list[dict]:
    """The memories of methods that mirror, after a look at what noise becomes."""
    numbers = {name: i for i, (name, k) in enumerate(zip(loss.names, which))
               if k is not None and methods[k].reflect and name in memories[k]}
    if not numbers:
        return memories
    keys = {i: _key(memories[which[i]][name]) for name, i in numbers.items()}
    seen = dict(zip(numbers.values(), _seen(loss, leaves, keys)))
    new = [dict(m) for m in memories]
    for name, i in numbers.items():
        k = which[i]
        new[k][name] = methods[k].reflect(memories[k][name], seen[i])
    return new


def _key(state):
    """The random key in a state: its only one."""
    return next(x for x in jax.tree.leaves(state)
                if jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _seen(loss, leaves, keys):
    """ξᵀ (ξ W) of the leaves that have keys: the gradient of ½ ‖ξ W‖², over as many ξ."""
    def half_squares(mine):
        whole, of = list(leaves), {}
        for i, x in mine.items():
            whole[i] = x

        def product(eqn, values, at, place):
            arrays, weight, x = [v.array for v in values], values[at].mark, values[1 - at]
            outs = jc.bind(eqn, arrays)
            if not weight.is_weight or not x.mark.leaves:
                return outs
            if SHARDS in place or eqn.primitive.name not in PRODUCTS:
                raise ValueError(
                    "A mirror sends noise through plain products, whole on each device, got "
                    f"{said(eqn)} "
                    f"{'in a shard_map' if SHARDS in place else 'with its own derivative'}: use "
                    "learning.feedback_alignment() for its parameters."
                )
            of[repr(place)] = min(weight.leaves)
            key = jax.random.fold_in(keys[min(weight.leaves)], zlib.crc32(repr(place).encode()))
            arrays[1 - at] = jax.random.normal(key, x.array.shape, x.array.dtype)
            y = jc.bind(eqn, arrays)[0]
            return outs, jnp.sum(y * y) / jnp.asarray(2 * _times(eqn, at), y.dtype)

        _, sums = loss.run(whole, product, mine)
        uses = list(of.values())  # each is an estimate, and so is each step of a loop
        return sum(
            jnp.mean(s).astype(float) / uses.count(of[place]) for place, s in sums.items()
        )

    found = grad(half_squares)({i: leaves[i] for i in keys})
    return [found[i] for i in keys]


def _times(eqn, at) -> float:
    """How many inputs one weight meets."""
    y = eqn.outvars[0].aval
    if eqn.primitive.name == "conv_general_dilated":
        return y.size / y.shape[eqn.params["dimension_numbers"].out_spec[1]]
    if eqn.primitive.name == "ragged_dot_general":
        return y.size / y.shape[-1]
    (over, _), w = eqn.params["dimension_numbers"], eqn.invars[at].aval
    return y.size / math.prod(n for d, n in enumerate(w.shape) if d not in over[at])
