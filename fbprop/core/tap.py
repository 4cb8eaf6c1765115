"""A tap: a value as it is, of whose cotangent the backward sweep leaves numbers.

``y = tap(x, t₀, t₁, ...)`` is x. Its rule gives x what y gets, ȳ, and the operand tᵢ, zeros that
nothing reads, the statistic fᵢ(ȳ) in place of a cotangent. So what is seen of a cotangent comes out
like a gradient: through jit, branches and shards, and of a loop's steps stacked.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fbprop.core import jaxcompat as jc
from fbprop.core.factored import Rows, dense
from fbprop.core.rule import Rule, Step


def tap(x, numbers, of):
    """``x``; ``numbers``: zeros of the types of the statistics ``of``, a tuple of functions."""
    return tap_p.bind(x, *numbers, of=of)


def seen(x, of):
    """The statistics of an array, as floating-point arrays: such have cotangents.

    A function with an attribute ``takes_rows`` gets what is `Rows` as it is.
    """
    return [_floating(f(x if getattr(f, "takes_rows", False) else dense(x))) for f in of]


def _floating(x):
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype("float32")


class Tap(Rule):
    """What passes is not touched, and nothing is kept."""

    takes_zeros = True
    takes_factored = Rows

    def declared(self, site):
        return ()

    def prepare(self, site):
        def backward(kept, extra, douts):
            (dy,) = douts
            statistics = seen(dy, site.params["of"])
            return [dy, *(jc.varying_like(s, t) for s, t in zip(statistics, site.in_avals[1:]))]

        return Step((), backward)


tap_p = Primitive("tap")
tap_p.def_impl(lambda x, *_, of: x)
tap_p.def_abstract_eval(lambda x, *_, of: x)
ad.primitive_jvps[tap_p] = lambda primals, tangents, of: (tap_p.bind(*primals, of=of), tangents[0])
batching.primitive_batchers[tap_p] = lambda args, dims, of: (args[0], dims[0])
mlir.register_lowering(tap_p, lambda ctx, x, *_, of: [x])
TAP = Tap("tap", "y = x;  x̄ = ȳ, t̄ᵢ = fᵢ(ȳ), what is to be known of ȳ (`fbprop.core.tap`)")
