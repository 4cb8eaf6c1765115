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

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core import jaxcompat as jc
from fbprop.core.factored import Rows
from fbprop.core.tap import tap
from fbprop.watch.factors import wide
from fbprop.watch.points import BODIES
from fbprop.watch.rerun import inside
from fbprop.watch.statistics import nan_kept

# Equations that go back at once. So the temporary memory of `first_nonfinite` is 1.15 of the
# gradient's for a GPT, 1.00 for a ViT and a graph network (jax 0.10.2); in one piece 1.5 to 1.6.
PIECE = 40


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
    if not x.size:
        return jnp.zeros(2, x.dtype)
    return nan_kept(x, jnp.stack([jnp.min(x), jnp.max(x)]))


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

    The rest, ``uses`` and ``returns``, are the cotangents of ``zeros``. A long body goes back a
    piece at a time, each run once more: what is looked at cannot be fused and would all be held.
    """
    body = jc.open_jaxpr(plan.jaxpr)
    env = dict(zip(body.constvars, jc.consts_of(plan.jaxpr)))
    env.update(zip(body.invars, args))
    record = {**zeros, "values": {}, "chosen": {}, "inner": {}}
    for start in range(0, len(body.eqns), PIECE):
        numbers = range(len(body.eqns))[start : start + PIECE]
        taken, left = _passing(body, numbers)

        def piece(values, numbers=numbers, taken=taken, left=left):
            mine = dict(zip(taken, values))
            seen = _run(plan, numbers, mine, zeros)
            return [mine[v] for v in left], seen

        again = jax.checkpoint(piece) if len(body.eqns) > PIECE else piece
        values, seen = again([env[v] for v in taken])
        env.update(zip(left, values))
        for kind, found in seen.items():
            record[kind].update(found)
    outs = [env[v] if jc.is_var(v) else jc.literal(v) for v in body.outvars]
    for j, zero in zeros["returns"].items():
        outs[j] = tap(outs[j], [zero], (extent,))
    return outs, record


def _passing(body, numbers):
    """The variables that a piece of a body takes from elsewhere, and those it leaves."""
    piece, after = (body.eqns[k] for k in numbers), body.eqns[numbers.stop :]
    read = {v: None for eqn in piece for v in eqn.invars if jc.is_var(v)}
    made = {v: None for k in numbers for v in body.eqns[k].outvars}
    later = {v for eqn in after for v in eqn.invars if jc.is_var(v)}
    later |= {v for v in body.outvars if jc.is_var(v)}
    return [v for v in read if v not in made], [v for v in made if v in later]


def _run(plan, numbers, env, zeros):
    """Run equations on the variables' values ``env``, which get the results; what is recorded."""
    body, seen = jc.open_jaxpr(plan.jaxpr), {"values": {}, "chosen": {}, "inner": {}}
    for i in numbers:
        eqn = body.eqns[i]
        operands = [env[v] if jc.is_var(v) else v.val for v in eqn.invars]
        with jc.equation_context(eqn):
            if i in zeros["chosen"]:
                seen["chosen"][i] = _chosen(operands, zeros["chosen"][i])
            for k, zero in zeros["uses"].get(i, {}).items():
                if jc.is_var(eqn.invars[k]):
                    operands[k] = tap(operands[k], [zero], (extent,))
        if i in zeros["inner"]:
            step = plan.steps[i][2]
            outs, seen["inner"][i] = inside(eqn, step, operands, zeros["inner"][i], recorded)
        else:
            outs = jc.bind(eqn, operands)
        with jc.equation_context(eqn):
            seen["values"][i] = {r: extent(outs[r]) for r in zeros["values"][i]}
        env.update(zip(eqn.outvars, outs))
    return seen


def _chosen(operands, zeros):
    """Of a select's cases what it takes of them."""
    which, *cases = operands
    which = which.astype("int32")
    out = {}
    for k in zeros:
        case = jnp.asarray(cases[k - 1])
        out[k] = extent(jnp.where(which == k - 1, case, lax.full_like(case, 0)))
    return out
