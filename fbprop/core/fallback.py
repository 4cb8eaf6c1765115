"""Asking JAX for the derivative of a single equation."""

from __future__ import annotations

from jax import vjp as jax_vjp  # at import: who replaces `jax.vjp` by ours must not meet it here

from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.rule import Rule, Step

FALLBACKS = ("registered", "jax", None)


class Fallback(Rule):
    """JAX differentiates the one equation that has no rule, as its primitive was registered."""

    takes_zeros = True

    def keeps(self):
        return "what JAX keeps"

    def prepare(self, site):
        return jax_step(site)


def jax_step(site) -> Step:
    """One equation by `jax.vjp`, on its active operands and wanted results."""
    moving = [i for i, r in enumerate(site.reached) if r]

    def forward(*operands):
        def call(*moved):
            values = list(operands)
            for i, value in zip(moving, moved):
                values[i] = value
            outs = jc.bind(site.eqn, values)
            return [o for o, w in zip(outs, site.wanted) if w], outs

        _, pullback, outs = jax_vjp(call, *(operands[i] for i in moving), has_aux=True)
        return outs, pullback

    def backward(_, pullback, douts):
        # Zeros stay symbolic: JAX refuses a dense one for what `jax.vmap` does not map.
        wanted = [
            jc.no_cotangent(a) if ct.is_zero(d) else ct.dense(d, a)
            for d, a, w in zip(douts, site.out_avals, site.wanted)
            if w
        ]
        out = [None] * len(site.in_avals)
        for i, d in zip(moving, pullback(wanted)):
            # JAX lets a user's rule, and some of its own, return another precision.
            out[i] = ct.converted(d, site.in_avals[i].dtype)
        return out

    return Step((), backward, forward)


FALLBACK = Fallback("jax.vjp", "y = f(x);  x̄ by jax.vjp of this one equation")


def fallback_rule(primitive, fallback) -> Rule | None:
    """The rule of a primitive that the table lacks.

    Args:
      fallback: "registered": for primitives of other packages that registered a derivative in JAX;
        "jax": for all; None: for none.
    """
    registered = jc.is_of_another_package(primitive) and jc.has_derivative(primitive)
    if fallback == "jax" or (fallback == "registered" and registered):
        return FALLBACK
    return None
