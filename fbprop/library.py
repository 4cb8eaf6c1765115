"""Recognising a library function among the named calls of a jaxpr, with certainty.

``jax.nn.relu`` appears as ``custom_jvp_call[name=relu]``, ``jax.nn.log_softmax`` as
``jit[name=log_softmax]``. The name alone proves nothing: a user's own function may be called the
same. So the library's function is traced on the same types and the two traces are compared
equation by equation; where a function has its own derivative (`jax.custom_jvp`), that must be the
very same Python function. What compares equal computes the same thing; nothing else gets the rule.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping

import jax
import numpy as np

from fbprop.jaxcompat import (
    bind,
    consts_of,
    derivative_function,
    differentiable,
    is_var,
    open_jaxpr,
    sub_jaxprs,
)

_CALLS = ("jit", "custom_jvp_call")


def identify(eqn, functions: Mapping[str, list[str]]) -> tuple[str | None, dict | None]:
    """Name and keyword arguments of the library function that an equation is a call of.

    Args:
      functions: dotted names to consider, by their last part.

    Returns:
      ``("jax.nn.log_softmax", {"axis": 1})``, or ``(None, None)``.
    """
    if eqn.primitive.name not in _CALLS:
        return None, None
    for dotted in functions.get(_call_name(eqn), ()):
        for arguments in _candidates(dotted, eqn.invars[0].aval):
            if _same_call(eqn, _reference(dotted, _types(eqn), arguments)):
                return dotted, dict(arguments)
    return None, None


def _call_name(eqn):
    if eqn.primitive.name == "jit":
        return eqn.params["name"]
    return open_jaxpr(eqn.params["call_jaxpr"]).debug_info.func_name


def _types(eqn):
    return tuple(v.aval for v in eqn.invars)


def _candidates(dotted, aval):
    """Argument sets under which the function may have been called: every axis, if it takes one."""
    if "axis" in inspect.signature(resolve(dotted)).parameters:
        return [(("axis", axis),) for axis in reversed(range(len(aval.shape)))]
    return [()]


@functools.cache
def resolve(dotted: str):
    """The function of that dotted name."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@functools.lru_cache(512)
def _reference(dotted, avals, arguments):
    """The equation that a call of the library's function on these types makes, or None."""
    fun = functools.partial(resolve(dotted), **dict(arguments))
    try:
        eqns = open_jaxpr(jax.make_jaxpr(fun)(*avals)).eqns
    except (TypeError, ValueError):  # the function does not take operands of these types
        return None
    return eqns[0] if len(eqns) == 1 else None


def _same_call(eqn, reference):
    if reference is None or eqn.primitive is not reference.primitive:
        return False
    key = "jaxpr" if eqn.primitive.name == "jit" else "call_jaxpr"
    if not same_jaxpr(eqn.params[key], reference.params[key]):
        return False
    if eqn.primitive.name == "jit":
        return True
    derivative = derivative_function(eqn)
    return derivative is not None and derivative is derivative_function(reference)


@functools.lru_cache(512)
def jvp_jaxpr(eqn):
    """A ``custom_jvp_call``'s own derivative: jaxpr of ``(operands, tangents) -> (ys, tangents)``.

    Tangents are those of the operands and results that have one; the user's rule runs through
    public `jax.jvp`, which calls it and does nothing else to a single such equation.
    """
    avals = _types(eqn)
    moving = [i for i, a in enumerate(avals) if differentiable(a)]

    def jvp(operands, tangents):
        def call(*moved):
            values = list(operands)
            for i, value in zip(moving, moved):
                values[i] = value
            return bind(eqn, values)

        outs, dots = jax.jvp(call, [operands[i] for i in moving], list(tangents))
        return outs, [d for d, out in zip(dots, outs) if differentiable(jax.typeof(out))]

    return jax.make_jaxpr(jvp)(avals, [avals[i] for i in moving])


def same_jaxpr(a, b) -> bool:
    """Whether two jaxprs are the same up to the names of their variables."""
    if a is b:
        return True
    a, b, consts = open_jaxpr(a), open_jaxpr(b), (consts_of(a), consts_of(b))
    if [len(x) for x in (a.invars, a.eqns, a.outvars, consts[0])] != [
        len(x) for x in (b.invars, b.eqns, b.outvars, consts[1])
    ] or not all(_same_value(x, y) for x, y in zip(*consts)):
        return False
    names = dict(zip((*a.constvars, *a.invars), (*b.constvars, *b.invars)))

    def same_atoms(xs, ys):
        return len(xs) == len(ys) and all(
            names.get(x) is y
            if is_var(x) and is_var(y)
            else is_var(x) == is_var(y) and _same_value(x.val, y.val)
            for x, y in zip(xs, ys)
        )

    if any(x.aval != y.aval for x, y in zip(a.invars, b.invars)):
        return False
    for p, q in zip(a.eqns, b.eqns):
        if p.primitive is not q.primitive or not same_atoms(p.invars, q.invars):
            return False
        if len(p.outvars) != len(q.outvars) or not _same_params(p, q):
            return False
        names.update(zip(p.outvars, q.outvars))
    return same_atoms(a.outvars, b.outvars)


def _same_params(p, q):
    if p.primitive.name == "custom_jvp_call":
        return _same_call(p, q)
    inner_p, inner_q = list(sub_jaxprs(p.params)), list(sub_jaxprs(q.params))
    if [n for n, _ in inner_p] != [n for n, _ in inner_q]:
        return False
    skip = {n for n, _ in inner_p}
    plain = [{k: v for k, v in e.params.items() if k not in skip} for e in (p, q)]
    return plain[0] == plain[1] and all(
        same_jaxpr(x, y) for (_, x), (_, y) in zip(inner_p, inner_q)
    )


def _same_value(x, y):
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
