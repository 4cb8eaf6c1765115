"""The ranges of all values and of what every use of one brings its cotangent: a trail to go back.

A level is a body of equations, the function's or one inside it. Its record is a dict of dicts of
pairs [smallest, largest], nan if a nan is among them, stacked over the loops around it:

* ``values``: {equation: {result: ·}}, forward;
* ``chosen``: {select: {operand: ·}}, of what is selected of it;
* ``uses``: {equation: {operand: ·}}, what the equation gives the operand's cotangent;
* ``returns``: {result of the body: ·}, the cotangent it gets;
* ``inner``: {equation: [record of each of its bodies]}.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from fbprop.core import jaxcompat as jc
from fbprop.core.factored import Rows
from fbprop.core.tap import tap
from fbprop.watch.factors import wide
from fbprop.watch.points import BODIES
from fbprop.watch.rerun import inside


def extent(x):
    """[smallest, largest] number of an array, of complex ones of both parts; float32 or wider.

    Of `Rows` that of their sums by place: of a table the other elements are 0.
    """
    if isinstance(x, Rows):
        x = x.merged()
        x = x.values if isinstance(x, Rows) else x
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    x = wide(x)
    return jnp.stack([jnp.min(x), jnp.max(x)]) if x.size else jnp.zeros(2, x.dtype)


extent.takes_rows = True


def blank(plan, steps=()):
    """A record of zeros for a planned body inside loops of these lengths."""
    body = jc.open_jaxpr(plan.jaxpr)
    record = {"values": {}, "chosen": {}, "uses": {}, "returns": {}, "inner": {}}

    def pairs(atoms):
        return {k: _pair(v.aval, steps) for k, v in atoms if jc.differentiable(v.aval)}

    for i, (eqn, decided) in enumerate(zip(body.eqns, plan.steps)):
        record["values"][i] = pairs(enumerate(eqn.outvars))
        if eqn.primitive.name == "select_n":
            record["chosen"][i] = pairs(list(enumerate(eqn.invars))[1:])
        if decided is None:
            continue
        site, _, step = decided
        record["uses"][i] = pairs((k, v) for k, v in enumerate(eqn.invars) if site.reached[k])
        if goes_inside(eqn, step):
            length = eqn.params["length"] if eqn.primitive.name == "scan" else None
            around = steps if length is None else (*steps, length)
            record["inner"][i] = [blank(both.plan, around) for both in step.inner]
    wanted = zip(body.outvars, plan.wanted, plan.active_out)
    record["returns"] = pairs((j, v) for j, (v, w, a) in enumerate(wanted) if w and a)
    return record


def _pair(aval, steps):
    real = jnp.finfo(aval.dtype).dtype
    return jnp.zeros((*steps, 2), "float32" if real.itemsize <= 2 else real)


def goes_inside(eqn, step):
    """Whether an equation has a record of its inside."""
    name = eqn.primitive.name
    return bool(step and step.inner) and name in BODIES and name != "shard_map"


def recorded(plan, args, zeros):
    """Results of a planned body, and its record, in the form of ``zeros``, as far as it is forward.

    The rest, ``uses`` and ``returns``, are the cotangents of ``zeros``.
    """
    body = jc.open_jaxpr(plan.jaxpr)
    env = dict(zip(body.constvars, jc.consts_of(plan.jaxpr)))
    env.update(zip(body.invars, args))
    record = {**zeros, "values": {}, "chosen": {}, "inner": {}}
    for i, (eqn, decided) in enumerate(zip(body.eqns, plan.steps)):
        operands = [env[v] if jc.is_var(v) else v.val for v in eqn.invars]
        with jc.equation_context(eqn):
            if i in zeros["chosen"]:
                record["chosen"][i] = _chosen(operands, zeros["chosen"][i])
            for k, zero in zeros["uses"].get(i, {}).items():
                operands[k] = tap(operands[k], [zero], (extent,)) if jc.is_var(eqn.invars[k]) else (
                    operands[k]
                )
        if i in zeros["inner"]:
            outs, record["inner"][i] = inside(
                eqn, decided[2], operands, zeros["inner"][i], recorded
            )
        else:
            outs = jc.bind(eqn, operands)
        with jc.equation_context(eqn):
            record["values"][i] = {r: extent(outs[r]) for r in zeros["values"][i]}
        env.update(zip(eqn.outvars, outs))
    outs = [env[v] if jc.is_var(v) else jc.literal(v) for v in body.outvars]
    for j, zero in zeros["returns"].items():
        outs[j] = tap(outs[j], [zero], (extent,))
    return outs, record


def _chosen(operands, zeros):
    """Of a select's cases what it takes of them."""
    which, *cases = operands
    which = which.astype("int32")
    out = {}
    for k in zeros:
        case = jnp.asarray(cases[k - 1])
        out[k] = extent(jnp.where(which == k - 1, case, lax.full_like(case, 0)))
    return out
