"""Functions with a derivative of their own (`jax.custom_jvp`, `jax.custom_vjp`) run as written.

In a jaxpr they stand traced. Where values are known their Python code may look at them, as under
`jax.grad`: then the equation calls what the user wrote, and JAX differentiates it.
"""

from __future__ import annotations

from jax.extend.core import Primitive

from fbprop.core import jaxcompat as jc


class Written:
    """What the user wrote: the function, and its derivative's functions."""

    def __init__(self, prim, functions, params):
        self.prim, self.functions, self.params = prim, functions, params

    def __call__(self, *args):
        for function in self.functions:
            for store in function.stores:  # of the structure of results: written at each run
                store and store.reset()
        return self.prim.bind(*args, subfuns=self.functions, **self.params)


class _WrittenPrimitive(Primitive):
    """Runs Python code each time, under whatever trace there is then."""

    multiple_results = True

    def bind(self, *args, call):
        return call(*args)


WRITTEN = _WrittenPrimitive("custom_vjp_call")  # the rule of that name asks JAX


def as_written(jaxpr, written, *names):
    """The jaxpr with its equations of these primitives as calls of what the user wrote.

    Args:
      written: `Written` by the first result of its equation.
    """

    def changed(eqn):
        found = eqn.outvars and eqn.primitive.name in names
        call = written.get(eqn.outvars[0]) if found else None
        return eqn.replace(primitive=WRITTEN, params={"call": call}) if call else eqn

    return jc.with_equations(jaxpr, [*map(changed, jc.open_jaxpr(jaxpr).eqns)])
