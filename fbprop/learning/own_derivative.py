"""Functions with a derivative of their own that are products: linear in data and in a weight.

Of `jax.custom_jvp` and `jax.custom_vjp`, whose backward pass may read the weight anywhere. Where
the function is linear in both, as a product in another precision is, that pass with a feedback
weight in the weight's place is what the rule asks for. Of any other it would be something else: of
relu(x w) it would cut off where x b is negative.
"""

from __future__ import annotations

import jax
from jax import lax

from fbprop.core import jaxcompat as jc

CUSTOM = ("custom_jvp_call", "custom_vjp_call")


def is_product(eqn, linear, chosen, products) -> bool:
    """Whether the result is linear in the first operand and in the second, but for constants.

    Args:
      linear, chosen: names of equations that are linear, in all operands or in those of these
        numbers; products: names of products.
    """
    (*_, body), *more = jc.sub_jaxprs(eqn.params)
    flat = jc.open_jaxpr(_written_out(body))
    if more or len(flat.invars) < 2 or len(flat.outvars) != 1:
        return False
    # Of each value, which of the two operands it is linear in; None: in neither, though made of it.
    made = {v: frozenset((i,)) for i, v in enumerate(flat.invars[:2])}
    for e in flat.eqns:
        degrees = [made.get(v, frozenset()) if jc.is_var(v) else frozenset() for v in e.invars]
        made.update(dict.fromkeys(e.outvars, _degree(e, degrees, linear, chosen, products)))
    return made.get(flat.outvars[0]) == frozenset((0, 1))


def _degree(eqn, degrees, linear, chosen, products):
    """What the results are linear in; None if they are not."""
    name, at = eqn.primitive.name, [i for i, d in enumerate(degrees) if d != frozenset()]
    kinds = {degrees[i] for i in at}
    if not at or None in kinds:
        return None if at else frozenset()
    if name in products or name == "mul":
        one, other = degrees[0], degrees[1]
        return one | other if not one & other and max(at) < 2 else None
    fits = name in linear or all(i in chosen.get(name, ()) for i in at)
    return kinds.pop() if fits and len(kinds) == 1 else None


def _written_out(jaxpr):
    """A jaxpr without calls."""
    def run(*values):
        return _run(jaxpr, values)

    return jax.make_jaxpr(run)(*jc.in_avals(jaxpr))


def _run(jaxpr, values):
    body = jc.open_jaxpr(jaxpr)
    env = dict(zip(body.constvars, jc.consts_of(jaxpr))) | dict(zip(body.invars, values))
    for eqn in body.eqns:
        operands = [env[v] if jc.is_var(v) else v.val for v in eqn.invars]
        called = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
        outs = jc.bind(eqn, operands) if called is None else _run(called, operands)
        env.update(zip(eqn.outvars, outs))
    return [env[v] if jc.is_var(v) else jc.literal(v) for v in body.outvars]


def fed_by_its_own(eqn, operands, at: int, feedback):
    """The result of such a function; its own derivative, at the feedback weight for the data.

    The function is computed twice: once for each side's derivative.
    """
    def of(data, weight, others):
        first = [data, weight] if at else [weight, data]
        return jc.bind(eqn, [*first, *others])[0]

    data, weight, *others = operands[1 - at], operands[at], *operands[2:]
    still = lax.stop_gradient
    back = of(data, still(feedback), [*map(still, others)])
    return [of(still(data), weight, others) + (back - still(back))]
