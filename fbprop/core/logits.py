"""Products that only a cross-entropy of class numbers reads: a fused operation would serve.

How a loss is written differs from library to library, so values are followed, not spellings: from
a product with a matrix, through whatever is element by element, to what leaves one number per row:
the sum of exponentials, its logarithm, and the label's own logit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import jax.numpy as jnp

from fbprop.core import jaxcompat as jc

ALONG = {"add", "broadcast_in_dim", "convert_element_type", "copy", "div", "exp", "max", "mul",
         "neg", "reshape", "select_n", "sharding_constraint", "slice", "stop_gradient", "sub",
         "tanh"}
ENOUGH = {"exp", "reduce_sum", "log", "gather"}
CALLS = {"jit", "custom_jvp_call", "custom_vjp_call", "closed_call", "remat2", "checkpoint"}
# Fewer rows are one chunk of the operation, and of fewer classes than features the gradient that
# it keeps is larger than the logits.
ROWS = 256


class Logits(NamedTuple):
    """Their shape and type, where they are made, and how many bytes they are."""

    type: str
    where: str
    bytes: int


class _Flat(NamedTuple):
    """An equation in the caller's place, its operands and results as marks."""

    eqn: Any
    ins: list
    outs: list
    differentiated: bool


def only_for_cross_entropy(plan) -> Iterator[Logits]:
    """The logits of a plan, and of the loops and branches in it, that nothing else reads."""
    flat = []
    results = _flatten(plan.jaxpr, plan.steps, None, flat)
    for found in flat:
        if found.differentiated and _is_head(found.eqn) and _serves(flat, found.outs[0], results):
            (z,) = found.eqn.outvars
            yield Logits(z.aval.str_short(short_dtypes=True), jc.source_line(found.eqn) or "",
                         jc.nbytes(z.aval))
    for found in filter(None, plan.steps):
        if found[0].name not in CALLS:
            for both in found[2].inner:
                yield from only_for_cross_entropy(both.plan)


def _flatten(jaxpr, steps, given, flat):
    """Appends the equations to ``flat``, those of calls in their place; the marks of results."""
    body = jc.open_jaxpr(jaxpr)
    at = dict(zip(body.invars, given or map(_mark, body.invars)))
    look = lambda v: at.setdefault(v, object()) if jc.is_var(v) else None
    for eqn, found in zip(body.eqns, steps or repeat(None)):
        ins, inner = [look(v) for v in eqn.invars], found[2].inner if found else ()
        called = [j for _, j in jc.sub_jaxprs(eqn.params)] if eqn.primitive.name in CALLS else []
        if len(inner) == len(called) == 1:
            outs = _flatten(inner[0].plan.jaxpr, inner[0].plan.steps, ins, flat)
        elif called:
            outs = _flatten(called[0], None, ins, flat)
        else:
            outs = [*map(_mark, eqn.outvars)]
            flat.append(_Flat(eqn, ins, outs, found is not None))
        at.update(zip(eqn.outvars, outs))
    return [look(v) for v in body.outvars]


def _mark(_):
    return object()


def _is_head(eqn):
    """Whether it is x [..., D] times a matrix [D, V] with more classes than features."""
    if eqn.primitive.name != "dot_general":
        return False
    (x, w), ((over, of_w), batch) = (v.aval for v in eqn.invars), eqn.params["dimension_numbers"]
    rows = eqn.outvars[0].aval.shape[:-1]
    plain = w.ndim == 2 and len(of_w) == 1 and not batch[0] and tuple(over) == (x.ndim - 1,)
    return plain and w.shape[1 - of_w[0]] > w.shape[of_w[0]] and math.prod(rows) > ROWS


def _serves(flat, logits, results):
    """Whether all that becomes of the logits is a cross-entropy."""
    whole, rows, onehot, seen, width = {logits}, set(), set(), set(), None
    for eqn, ins, outs, _ in flat:
        name, (out, *_) = eqn.primitive.name, eqn.outvars
        width = out.aval.shape[-1] if outs[0] is logits else width
        if used := sum(i in whole for i in ins):
            seen.add(name)
            ends = _ends(eqn, width)
            if used > 1 or ends is None:
                return False
            (rows if ends else whole).update(outs)
            if name == "mul" and onehot & {*ins}:
                seen.add("gather")
        elif rows & {*ins}:
            seen.update({name} & {"log"})
            rows.update(outs)
        elif _counts(eqn) or (onehot & {*ins} and name in ALONG):
            onehot.update(outs)
    return not whole & {*results} and ("softmax_cross_entropy" in seen or seen >= ENOUGH)


def _ends(eqn, width):
    """Whether numbers per row come out of logits, or logits again; None if it is something else."""
    name, x, out = eqn.primitive.name, eqn.invars[0].aval, eqn.outvars[0].aval
    if out.shape[-1:] == (width,) and name in (*ALONG, "gather"):
        return False
    if name in ("reduce_max", "reduce_sum"):
        return x.ndim - 1 in eqn.params["axes"] or None
    return name in ("gather", "softmax_cross_entropy") or None


def _counts(eqn):
    """Whether integers are compared: labels with the numbers of classes."""
    return eqn.primitive.name == "eq" and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.integer)
