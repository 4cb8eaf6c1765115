"""A loss run equation by equation, with what is known of each value beside it.

Every product of a weight with data is handed to whoever asked: to multiply with a feedback weight
in the backward pass, to note what goes in and comes out, to add noise. Whatever is not about a
weight runs as it stands.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax

from fbprop import rules as _rules
from fbprop.core import jaxcompat as jc
from fbprop.core.operation import Operation
from fbprop.learning.own_derivative import CUSTOM, is_product
from fbprop.learning.value import CONSTANT, KINDS, Mark, Value, joined
from fbprop.rules.control import choose
from fbprop.rules.shard import mapped

LOOP, BRANCH, SHARDS = "loop", "branch", "shards"
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
# Linear in all operands together.
LINEAR = frozenset((
    "add", "add_any", "all_gather", "all_gather_invariant", "all_to_all", "broadcast_in_dim",
    "concatenate", "convert_element_type", "copy", "copy_p", "cumsum", "expand_dims", "imag",
    "name", "neg", "optimization_barrier", "pad", "ppermute", "psum", "psum_invariant", "pvary",
    "real", "reduce_precision", "reduce_scatter", "reduce_sum", "reshape", "reshard", "rev",
    "sharding_constraint", "slice", "split", "squeeze", "stop_gradient", "sub", "transpose",
))
# Linear in the operands of these numbers; the others choose, or scale.
LINEAR_IN = {
    "div": (0,), "dynamic_slice": (0,), "gather": (0,), "dynamic_update_slice": (0, 1),
    "select_n": range(1, 100),
}
CALLS = ("jit", "pjit", "closed_call", "core_call", "call", "custom_vmap_call", "eval_jaxpr")


class Trace:
    """Runs a jaxpr; ``product(eqn, values, at, place)`` returns results of a product with a weight.

    ``values`` are the equation's operands, that at ``at`` the weight; ``place`` says where the
    equation stands: its number, after those of the equations around it. It returns a list of
    arrays, or that and a note, which is found in `noted`: those of a loop's steps stacked. A
    ``place`` in a loop has LOOP in it, in a branch BRANCH, in a ``shard_map`` SHARDS.

    Args:
      consts: the mark of arrays that the loss closes over.
      every: whether products with parameters that have no feedback are handed over too, and what
        `jax.checkpoint` is around is run as it stands, for whoever notes what is inside.
    """

    def __init__(self, product: Callable, consts: Mark = CONSTANT, every: bool = False):
        self.product, self.consts, self.every, self.noted = product, consts, every, {}

    def run(self, jaxpr, values, place=()) -> list[Value]:
        """The results of a jaxpr."""
        body = jc.open_jaxpr(jaxpr)
        env = dict(zip(body.constvars, (Value(c, self.consts) for c in jc.consts_of(jaxpr))))
        env.update(zip(body.invars, values))
        for i, eqn in enumerate(body.eqns):
            operands = [env[v] if jc.is_var(v) else Value(v.val) for v in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, operands, (*place, i))))
        return [env[v] if jc.is_var(v) else Value(jc.literal(v)) for v in body.outvars]

    def equation(self, eqn, values, place):
        name, marks = eqn.primitive.name, [v.mark for v in values]
        asked = ("weight", "made", "parameter") if self.every else ("weight", "made")
        inner = [jaxpr for _, jaxpr in jc.sub_jaxprs(eqn.params)]
        if not any(m.kind in asked for m in marks):
            return bound(eqn, values)
        if name in PRODUCTS:
            return self.multiply(eqn, values, place)
        if name in CALLS or (self.every and name in ("remat2", "checkpoint")):
            with jc.equation_context(eqn):
                return _call(eqn, values, lambda values: self.run(inner[0], values, place))
        run = {"scan": self.scan, "cond": self.cond, "shard_map": self.shards,
               "remat2": self.remat, "checkpoint": self.remat}
        if name in run and has_products(eqn):
            with jc.equation_context(eqn):
                return run[name](eqn, [*map(_as_array, values)], place)
        if (plain := plain_form(eqn)) is not None and _multiplies(plain):
            with jc.equation_context(eqn):
                return self.run(plain, values, place)
        if not inner or name == "while" or not has_products(eqn):
            return linear(eqn, values) or bound(eqn, values)
        if name in CUSTOM and is_product(eqn, LINEAR, LINEAR_IN, PRODUCTS):
            return self.multiply(eqn, values, place)
        if self.is_served(marks):
            raise ValueError(
                f"A learning rule reaches the products inside a function, got {said(eqn)}, whose "
                "derivative is its own and may read the weight anywhere; expected one that is "
                "linear in data and in weight: use learning.backprop() for its parameters."
            )
        return linear(eqn, values) or bound(eqn, values)

    @staticmethod
    def is_served(marks):
        return any(m.kind in ("weight", "made") for m in marks)

    def multiply(self, eqn, values, place):
        """A product: with a weight, of two values of data, or of what is made of parameters."""
        marks = [v.mark for v in values[:2]]
        made = next((m for m in marks if m.kind == "made"), None)
        kinds = {m.kind for m in marks}
        if made and kinds != {"made", "constant"}:
            raise ValueError(
                "A weight comes from its parameters through reshapes, casts, transposes and the "
                f"like, got {said(eqn)} with what was none any more after {made.made_by}: its "
                "feedback weight is not known; use learning.backprop() for its parameters."
            )
        if made or not kinds & {"weight", "parameter"} or all(m.rows for m in marks):
            return bound(eqn, values)
        if kinds == {"weight"} and not any(m.rows for m in marks):
            raise ValueError(
                f"A product with a weight has data on its other side, got {said(eqn)} of two "
                "weights: use learning.backprop() for the parameter that is no weight, as learned "
                "queries, and pass data to the loss as arguments."
            )
        if "constant" in kinds or kinds == {"parameter"}:
            return linear(eqn, values) or bound(eqn, values)
        at = max((0, 1), key=lambda i: (not marks[i].is_data, KINDS.index(marks[i].kind), i))
        if marks[at].is_data:  # rows of an embedding that meet data are their weight
            at = 0 if marks[0].rows else 1
        outs = self.product(eqn, values, at, place)
        if isinstance(outs, tuple):
            outs, self.noted[repr(place)] = outs
        leaves = frozenset().union(*(m.leaves for m in marks))
        return [Value(y, Mark("data", leaves)) for y in outs]

    # Equations that contain others

    def inside(self, jaxpr, place):
        """``values -> (results, noted)`` as a function of pytrees, for JAX to trace."""
        def run(values):
            inner = Trace(self.product, self.consts, self.every)
            outs = inner.run(jaxpr, values, place)
            return outs, inner.noted

        return run

    def remat(self, eqn, values, place):
        p = eqn.params
        run = self.inside(p["jaxpr"], place)
        outs, noted = jax.checkpoint(run, prevent_cse=p["prevent_cse"], policy=p["policy"])(values)
        self.noted |= noted
        return outs

    def cond(self, eqn, values, place):
        index, operands = values[0], values[1:]
        branches = eqn.params["branches"]
        runs = [self.inside(b, (*place, BRANCH, k)) for k, b in enumerate(branches)]
        shapes = [jax.eval_shape(run, operands) for run in runs]
        for _, noted in shapes:
            _check_unnoted(eqn, noted)
        marks = [joined(o.mark for o in outs) for outs in zip(*(outs for outs, _ in shapes))]
        marks = [_chosen(m, index.mark) for m in marks]

        def branch(run):
            return lambda operands: [o.marked(m) for o, m in zip(run(operands)[0], marks)]

        return choose(eqn.params, index.array, [*map(branch, runs)], operands)

    def shards(self, eqn, values, place):
        """A device's part of a weight is fed through the same part of its feedback weight."""
        run = self.inside(eqn.params["jaxpr"], (*place, SHARDS))

        def body(*values):
            outs, noted = run(list(values))
            _check_unnoted(eqn, noted)
            return outs

        return mapped(eqn, body, eqn.params["in_specs"], list(eqn.params["out_specs"]))(*values)

    def scan(self, eqn, values, place):
        p, (n_consts, n_carry) = eqn.params, jc.scan_sizes(eqn.params)
        consts, xs = values[:n_consts], values[n_consts + n_carry :]
        carry = values[n_consts : n_consts + n_carry]
        carry = [*map(_entering, carry, _changed(p["jaxpr"], n_consts, n_carry))]
        run = self.inside(p["jaxpr"], (*place, LOOP))

        def body(carry, xs):
            outs, noted = run([*consts, *carry, *xs])
            return outs[:n_carry], (outs[n_carry:], noted)

        first = [jax.tree.map(_first, x) for x in xs]
        while True:  # until what is carried is, after a step, no more than it was before
            outs, _ = jax.eval_shape(body, carry, first)
            marks = [joined((c.mark, o.mark)) for c, o in zip(carry, outs)]
            if marks == [c.mark for c in carry]:
                break
            carry = [c.marked(m) for c, m in zip(carry, marks)]

        def same(carry, xs):
            outs, others = body(carry, xs)
            return [o.marked(c.mark) for o, c in zip(outs, carry)], others

        carry, (ys, noted) = lax.scan(
            same, carry, xs, p["length"], reverse=p["reverse"], unroll=p["unroll"]
        )
        self.noted |= noted
        return [*carry, *ys]


def _check_unnoted(eqn, noted):
    if noted:
        raise ValueError(
            f"This learning rule notes the products of every step, got {said(eqn)} around "
            "one: use learning.backprop() for its parameters."
        )


def _as_array(value):
    return Value(jax.numpy.asarray(value.array), value.mark, value.feedback)


def _call(eqn, values, run):
    """The results of a call, operands and results put where it prescribes."""
    if "in_shardings" not in eqn.params:
        return run(values)

    def put(values, shardings):
        trees = [jax.tree.flatten(v) for v in values]
        return [
            jax.tree.unflatten(tree, jc.constrain(leaves, [s] * len(leaves)))
            for (leaves, tree), s in zip(trees, shardings)
        ]

    return put(run(put(values, eqn.params["in_shardings"])), eqn.params["out_shardings"])


def _changed(jaxpr, n_consts, n_carry):
    """Per carried value whether a step makes another of it, rather than hand it on."""
    body = jc.open_jaxpr(jaxpr)
    before = body.invars[n_consts : n_consts + n_carry]
    return [o is not v and jc.differentiable(v.aval) for o, v in zip(body.outvars, before)]


def _entering(value, changed):
    """What a loop changes is data, from the start: a learned first state is no weight."""
    return value.marked(Mark("data", value.mark.leaves)) if changed else value


def _first(x):
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _chosen(mark, by: Mark):
    """The mark of what an index chose."""
    if not by.is_data:
        return mark
    return mark._replace(rows=True) if mark.is_weight else Mark("data", mark.leaves)


def bound(eqn, values):
    """Results of an equation as it stands."""
    outs = jc.bind(eqn, [v.array for v in values])
    marks = [v.mark for v in values]
    kind = max((m.kind for m in marks), key=KINDS.index, default="constant")
    leaves = frozenset().union(*(m.leaves for m in marks))
    if kind == "data" or any(m.rows for m in marks):
        mark = Mark("data", leaves)
    elif kind in ("weight", "made"):
        made_by = next((m.made_by for m in marks if m.made_by), "") or said(eqn)
        mark = Mark("made", leaves, False, made_by)
    else:
        mark = joined(marks) if marks else CONSTANT
    return [Value(y, mark) for y in outs]


def linear(eqn, values):
    """Results of an equation that is linear in its weights; None of another."""
    name, marks = eqn.primitive.name, [v.mark for v in values]
    weights = [i for i, m in enumerate(marks) if m.is_weight]
    others = [m for m in marks if not m.is_weight]
    chooses = name in ("dynamic_slice", "gather", "select_n")
    if name in LINEAR:
        fits = True
    elif name in LINEAR_IN:
        fits = all(i in LINEAR_IN[name] for i in weights)
    else:  # of two factors
        fits = name in ("mul", *PRODUCTS) and len(weights) == 1
    floats = all(jc.differentiable(v.aval) for v in eqn.outvars)
    by_data = [i for i, m in enumerate(marks) if m.kind == "data"]
    at_will = chooses and all(i not in LINEAR_IN[name] for i in by_data)
    if not weights or not fits or not floats or any(m.kind == "made" for m in others):
        return None
    if by_data and not at_will:
        return None
    outs = jc.bind(eqn, [v.array for v in values])
    feedback = jc.bind(eqn, [v.stand_in for v in values])
    rows = bool(by_data) or any(m.rows for m in marks)
    leaves = frozenset().union(*(m.leaves for m in marks if m.is_weight))
    mark = Mark("weight", leaves, rows)
    return [Value(y, mark, b) for y, b in zip(outs, feedback)]


def plain_form(eqn):
    """An operation of fbprop's, such as a layer with its activation, in plain code; or None."""
    rule = _rules.current().get(eqn.primitive.name)
    if not isinstance(rule, Operation):
        return None
    return jax.make_jaxpr(lambda *xs: rule.in_plain_code(*xs, **eqn.params))(
        *(v.aval for v in eqn.invars)
    )


def has_products(eqn) -> bool:
    return eqn.primitive.name in PRODUCTS or any(
        _multiplies(jaxpr) for _, jaxpr in jc.sub_jaxprs(eqn.params)
    )


def _multiplies(jaxpr) -> bool:
    return any(map(has_products, jc.open_jaxpr(jaxpr).eqns))


def said(eqn) -> str:
    """An equation, in a sentence."""
    path, line = jc.scope(eqn), jc.source_line(eqn)
    return f"{eqn.primitive.name!r} (at {line}{f', path {path!r}' if path else ''})"
