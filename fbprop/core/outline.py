"""Library functions that are traced into their caller, as one call each.

``jax.nn.gelu`` and ``jax.nn.softmax`` leave five to nine equations in a jaxpr and no name. So a
function is traced on the same types, and its equations are looked for one after the other; others
may stand between them. Where each is the same, down to every literal, and nothing else uses what
is computed on the way, one call takes their place, for which the table may have a rule.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from fbprop.core.jaxcompat import is_var, open_jaxpr, with_equations
from fbprop.core.library import (
    CALLS,
    argument_sets,
    call_name,
    candidates,
    exists,
    reference,
    resolve,
    same_equation,
    traced,
)

# Equations that may stand between two of a function's. JAX traces a call without interruption; what
# comes between are operands computed late, or a loop's body written out. It bounds the search.
FURTHEST = 16


def outlined(jaxpr, functions: Mapping[str, list[str]]):
    """The jaxpr with calls in place of the equations that library functions left.

    Args:
      functions: dotted names to look for, by their last part.
    """
    body, starting = open_jaxpr(jaxpr), {}
    dtypes = ("float32", "bfloat16") if _is_narrow(body) else ("float32",)
    for dotted in filter(exists, itertools.chain(*functions.values())):
        for trace in _traces(dotted, dtypes):
            starting.setdefault(trace[0], []).append((trace, dotted))
    kinds = [*map(_kind, body.eqns)]
    found, gone = {}, set()
    for i, kind in enumerate(kinds):
        for trace, dotted in starting.get(kind, ()) if i not in gone else ():
            run = _run(kinds, i, trace)
            if run and not gone & set(run) and (call := _call(body, run, dotted)):
                found[run[-1]] = call
                gone |= set(run)
                break
    if not found:
        return jaxpr
    eqns = [found.get(i, eqn) for i, eqn in enumerate(body.eqns) if i not in gone or i in found]
    return with_equations(jaxpr, eqns)


def _kind(eqn):
    name = eqn.primitive.name
    return f"{name} {call_name(eqn)}" if name in CALLS else name


def _is_narrow(body):
    """Whether there are 16-bit numbers: for them functions are traced once more, 2 ms each."""
    atoms = itertools.chain(body.invars, *(eqn.invars for eqn in body.eqns))
    return any(getattr(x.aval, "dtype", None) in (np.float16, jnp.bfloat16) for x in atoms)


@functools.cache
def _traces(dotted, dtypes):
    """The kinds of equations a function consists of, if several, per way to call it."""
    found = {}
    for dtype, options in itertools.product(
        dtypes, argument_sets(dotted, axis=[0], keepdims=[False, True])
    ):
        fun = functools.partial(resolve(dotted), **dict(options))
        found[tuple(map(_kind, traced(fun, dotted, dtype)))] = None
    return [kinds for kinds in found if len(kinds) > 1]


def _run(kinds, start, trace):
    """Where equations of these kinds stand, from ``start`` on; None if they do not."""
    run = [start]
    for kind in trace[1:]:
        try:
            run.append(kinds.index(kind, run[-1] + 1, run[-1] + 2 + FURTHEST))
        except ValueError:
            return None
    return run


def _call(body, run, dotted):
    """The call that these equations are, or None."""
    eqns = [body.eqns[i] for i in run]
    operands = dict.fromkeys(v for eqn in eqns for v in eqn.invars if is_var(v))
    for eqn in eqns:
        for v in eqn.outvars:
            operands.pop(v, None)
    types, result = tuple(v.aval for v in operands), eqns[-1].outvars[0]
    for arguments in candidates(dotted, eqns, types, result):
        call = reference(dotted, types, arguments)
        trace = call and open_jaxpr(call.params["jaxpr"])
        if not trace or len(trace.eqns) != len(eqns):
            continue
        if trace is body:  # inside such a call
            return None
        names = dict(zip(trace.invars, operands))
        same = all(same_equation(*pair, names) for pair in zip(trace.eqns, eqns))
        if same and names[trace.outvars[0]] is result and not _inner(eqns) & _used(body, run):
            return call.replace(
                invars=[*operands], outvars=[result], source_info=eqns[-1].source_info,
                ctx=eqns[-1].ctx,
            )
    return None


def _inner(eqns):
    return {v for eqn in eqns for v in eqn.outvars} - {eqns[-1].outvars[0]}


def _used(body, run):
    """Variables that equations outside of these use, or that are results."""
    outside = [eqn.invars for i, eqn in enumerate(body.eqns) if i not in run]
    return {v for atoms in (*outside, body.outvars) for v in atoms if is_var(v)}
