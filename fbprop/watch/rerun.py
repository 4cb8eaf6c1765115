"""A planned function run again with its values looked at, inside calls, loops and branches too.

What is seen of a value forward is a result besides the function's own, stacked by loops. What is
seen of its cotangent comes back as the "gradient" of zeros given to a tap (`fbprop.core.tap`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fbprop.core import jaxcompat as jc
from fbprop.core.tap import seen, tap
from fbprop.rules.control import choose
from fbprop.rules.shard import mapped


def numbers(points, of):
    """Zeros in the form of the statistics ``of`` of a tree of points (`fbprop.watch.points`)."""
    def one(point):
        value = jax.ShapeDtypeStruct(point.shape, point.dtype)
        types = jax.eval_shape(lambda x: seen(x, of), value)
        return [jnp.zeros((*point.steps, *t.shape), t.dtype) for t in types]

    return {
        i: [numbers(body, of) for body in inner] if isinstance(inner, list)
        else {r: one(point) for r, point in inner.items()}
        for i, inner in points.items()
    }


def run(plan, args, taps, of):
    """Results of a planned body, and what is seen forward, in the form of ``taps``.

    Args:
      taps: `numbers` of the points that are watched; of: the statistics.
    """
    body = jc.open_jaxpr(plan.jaxpr)
    env = dict(zip(body.constvars, jc.consts_of(plan.jaxpr)))
    env.update(zip(body.invars, args))
    found = {}

    def go(plan, args, taps):
        return run(plan, args, taps, of)

    for i, (eqn, decided) in enumerate(zip(body.eqns, plan.steps)):
        operands = [env[v] if jc.is_var(v) else v.val for v in eqn.invars]
        if i not in taps:
            outs = jc.bind(eqn, operands)
        elif isinstance(taps[i], list):
            outs, found[i] = inside(eqn, decided[2], operands, taps[i], go)
        else:
            outs, found[i] = jc.bind(eqn, operands), {}
            with jc.equation_context(eqn):
                for r, zeros in taps[i].items():
                    found[i][r] = seen(outs[r], of)
                    outs[r] = tap(outs[r], zeros, of)
        env.update(zip(eqn.outvars, outs))
    return [env[v] if jc.is_var(v) else jc.literal(v) for v in body.outvars], found


def inside(eqn, step, operands, taps, go):
    """Results of an equation that contains others, and what is found in it, in the form of taps.

    Args:
      step: what was decided of it; taps: a tree per inner body.
      go: ``(plan, args, tree) -> results, a tree of the same form``, of a body.
    """
    run_as = INSIDE.get(eqn.primitive.name, _call)
    with jc.equation_context(eqn):
        return run_as(eqn, [both.plan for both in step.inner], operands, taps, go)


def _call(eqn, plans, operands, taps, go):
    def body(operands, taps):
        outs, found = go(plans[0], operands, taps[0])
        return outs, [found]

    if eqn.primitive.name != "jit":
        return body(operands, taps)
    ins, outs = eqn.params["in_shardings"], eqn.params["out_shardings"]

    def jitted(operands, taps):
        values, found = body(jc.constrain(operands, ins), taps)
        return jc.constrain(values, outs), found

    return jax.jit(jitted)(operands, taps)


def _scan(eqn, plans, operands, taps, go):
    n_consts, n_carry = jc.scan_sizes(eqn.params)
    consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]

    def step(carry, at):
        xs, taps = at
        outs, found = go(plans[0], (*consts, *carry, *xs), taps[0])
        return outs[:n_carry], (outs[n_carry:], [found])

    options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    xs = operands[n_consts + n_carry :]
    carry, (ys, found) = lax.scan(step, init, (xs, taps), **options)
    return [*carry, *ys], found


def _cond(eqn, plans, operands, taps, go):
    """What is seen of a branch that is not taken is 0."""
    def branch(number):
        def taken(taps, *args):
            outs, found = go(plans[number], args, taps[number])
            return outs, [found if k == number else t for k, t in enumerate(taps)]

        return taken

    index, *args = operands
    branches = [*map(branch, range(len(plans)))]
    return choose(eqn.params, index, branches, taps, *args)


def _remat(eqn, plans, operands, taps, go):
    flat, tree = jax.tree.flatten(taps)

    def body(*values):
        operands, taps = values[: -len(flat)], jax.tree.unflatten(tree, values[-len(flat) :])
        outs, found = go(plans[0], operands, taps[0])
        return outs, [found]

    prevent = eqn.params["prevent_cse"]
    if isinstance(prevent, tuple):  # jax 0.12: per operand
        prevent = (*prevent, *(False for _ in flat))
    again = jax.checkpoint(body, prevent_cse=prevent, policy=eqn.params["policy"])
    return again(*operands, *flat)


def _shard_map(eqn, plans, operands, taps, go):
    """Each device has a row of its own of what is seen."""
    axes = tuple(a for a in eqn.params["mesh"].axis_names if a in eqn.params["newly_manual_axes"])
    ins, outs = list(eqn.params["in_specs"]), list(eqn.params["out_specs"])

    def body(operands, taps):
        results, found = go(plans[0], operands, jax.tree.map(lambda t: t[0], taps[0]))
        return results, [jax.tree.map(lambda x: x[None], found)]

    each = PartitionSpec(axes)
    return mapped(eqn, body, (ins, each), (outs, each))(operands, taps)


INSIDE = {"cond": _cond, "remat2": _remat, "scan": _scan, "shard_map": _shard_map}
