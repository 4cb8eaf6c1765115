"""Recognising a library function among the named calls of a jaxpr, with certainty.

``jax.nn.relu`` appears as ``custom_jvp_call[name=relu]``, ``jax.nn.log_softmax`` as
``jit[name=log_softmax]``. The name alone proves nothing: a user's own function may be called the
same. So the library's function is traced on the same types and the two traces are compared
equation by equation; where a function has its own derivative (`jax.custom_jvp`), that must be the
very same Python function. What compares equal computes the same thing; nothing else gets the rule.
Functions that are traced into their caller, as ``jax.nn.gelu``, become calls by
`fbprop.core.outline`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fbprop.core.jaxcompat import (
    bind,
    consts_of,
    derivative_function,
    differentiable,
    is_var,
    open_jaxpr,
    sub_jaxprs,
)

CALLS = ("jit", "custom_jvp_call")
# Shapes of operands that a function can be traced with, of those that do not take matrices; and
# the size from which on in its second dimension it is of use to know it as a whole.
OPERANDS = {"jax.nn.dot_product_attention": (1, 2, 1, 2)}
LEAST = {"jax.nn.dot_product_attention": 65}  # of fewer steps the parts are faster, 1.5 times of 64


def identify(eqn, functions: Mapping[str, list[str]]) -> tuple[str | None, dict | None]:
    """Name and keyword arguments of the library function that an equation is a call of.

    Args:
      functions: dotted names to consider, by their last part.

    Returns:
      ``("jax.nn.log_softmax", {"axis": 1})``, or ``(None, None)``.
    """
    if eqn.primitive.name not in CALLS:
        return None, None
    for dotted in functions.get(call_name(eqn).lstrip("_"), ()):
        n = arity(dotted)
        types = tuple(v.aval for v in eqn.invars[:n])
        literals = [v.val for v in eqn.invars[n:] if not is_var(v)]
        for arguments in candidates(dotted, _body(eqn).eqns, types, eqn.outvars[0], literals):
            if _same_call(eqn, reference(dotted, types, arguments)):
                return dotted, dict(arguments)
    return None, None


def call_name(eqn):
    """Name of the function that an equation of `CALLS` calls."""
    if eqn.primitive.name == "jit":
        return eqn.params["name"]
    return open_jaxpr(eqn.params["call_jaxpr"]).debug_info.func_name


def _body(eqn):
    return open_jaxpr(eqn.params["jaxpr" if eqn.primitive.name == "jit" else "call_jaxpr"])


def candidates(dotted, eqns, types, result, literals=()):
    """Argument sets under which the function may have been called, to be tried in turn.

    Args:
      dotted: the function's name; eqns: what it may have been traced to.
      types: of its operands; literals: what else it was given; result: a variable.
    """
    # Only real numbers: the rules say nothing of conjugates.
    if not types or not jnp.issubdtype(types[0].dtype, jnp.floating):
        return []
    if dotted in OPERANDS and (len(types) != arity(dotted) or any(t.ndim != 4 for t in types)
                               or max(t.shape[1] for t in types) < LEAST[dotted]):
        return []
    axes = next(_axes(eqns), ())
    given = {"epsilon": map(float, literals)} if literals else {}  # by default it is no operand
    return argument_sets(
        dotted, axis=[axes[0] if len(axes) == 1 else tuple(axes)], ddof=map(int, literals),
        keepdims=[result.aval.ndim == types[0].ndim], scale=[None, *_factors(eqns)], **given,
    )


def _factors(eqns):
    """Numbers that the first product with one of a list of equations is with."""
    products = (eqn.invars for eqn in eqns if eqn.primitive.name == "mul")
    literals = (float(v.val) for v in next(products, ()) if not is_var(v) and not np.shape(v.val))
    return list(literals)


def _axes(eqns):
    """Axes that equations, also inner ones, reduce over."""
    for eqn in eqns:
        if "axes" in eqn.params:
            yield eqn.params["axes"]
        for _, inner in sub_jaxprs(eqn.params):
            yield from _axes(open_jaxpr(inner).eqns)


def argument_sets(dotted, **values):
    """Every combination of these values of those parameters that the function has."""
    values.setdefault("scale", [None])
    values |= {"approximate": [True, False], "is_causal": [False, True]}
    names = [n for n in values if n in inspect.signature(resolve(dotted)).parameters]
    return [tuple(zip(names, v)) for v in itertools.product(*(values[n] for n in names))]


@functools.cache
def exists(dotted: str) -> bool:
    """Whether there is a function of that dotted name; a rule may be for one that is not here."""
    try:
        return callable(resolve(dotted))
    except (ImportError, AttributeError, TypeError, ValueError):  # the last two: "tanh", ".tanh"
        return False


@functools.cache
def parts(dotted: str) -> frozenset[str]:
    """Names of the primitives a library function consists of; none if it has its own derivative."""
    if not exists(dotted):
        return frozenset()
    return frozenset(_primitives(traced(resolve(dotted), dotted, "float32")))


def traced(fun, dotted, dtype):
    """Equations of a library function, of small operands."""
    matrix = jax.ShapeDtypeStruct(OPERANDS.get(dotted, (2, 2)), dtype)
    with jax.numpy_dtype_promotion("standard"):  # JAX's attention of bfloat16 needs it
        return open_jaxpr(jax.make_jaxpr(fun)(*[matrix] * arity(dotted))).eqns


@functools.cache
def arity(dotted: str) -> int:
    """How many operands a library function has: the parameters that have to be given."""
    fun = resolve(dotted)
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = [p for p in inspect.signature(fun).parameters.values()
             if p.kind in by_position and p.default is p.empty]
    return getattr(fun, "nin", len(given))  # a universal function takes ``*args``


def _primitives(eqns):
    for eqn in eqns:
        if eqn.primitive.name != "custom_jvp_call":
            yield eqn.primitive.name
            for _, inner in sub_jaxprs(eqn.params):
                yield from _primitives(open_jaxpr(inner).eqns)


@functools.cache
def resolve(dotted: str):
    """The function of that dotted name."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@functools.lru_cache(512)
def reference(dotted, types, arguments):
    """The equation that a call of the library's function on these types makes, or None.

    A function that is not a call of its own, but traced into its caller, is made one.
    """
    fun = functools.partial(resolve(dotted), **dict(arguments))
    try:
        eqns = open_jaxpr(jax.make_jaxpr(fun)(*types)).eqns
        if len(eqns) > 1:
            with jax.disable_jit(False):  # a call also where the user has none compiled
                eqns = open_jaxpr(jax.make_jaxpr(jax.jit(fun))(*types)).eqns
    except (TypeError, ValueError):  # the function does not take operands of these types
        return None
    return eqns[0]


def _same_call(eqn, other):
    if other is None or eqn.primitive is not other.primitive:
        return False
    key = "jaxpr" if eqn.primitive.name == "jit" else "call_jaxpr"
    if not same_jaxpr(eqn.params[key], other.params[key]):
        return False
    if eqn.primitive.name == "jit":
        return True
    derivative = derivative_function(eqn)
    return derivative is not None and derivative is derivative_function(other)


@functools.lru_cache(512)
def jvp_jaxpr(eqn, active):
    """A ``custom_jvp_call``'s own derivative: jaxpr of ``(operands, tangents) -> (ys, tangents)``.

    Tangents are those of the active operands and of the results that have one: a rule that asks
    for ``symbolic_zeros`` sees which operands do not move. The user's rule runs through public
    `jax.jvp`, which calls it and does nothing else to a single such equation.
    """
    avals = tuple(v.aval for v in eqn.invars)
    moving = [i for i, a in enumerate(active) if a]

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
    if any(x.aval != y.aval for x, y in zip(a.invars, b.invars)):
        return False
    names = dict(zip((*a.constvars, *a.invars), (*b.constvars, *b.invars)))
    return same_equations(a.eqns, b.eqns, names) and _same_atoms(a.outvars, b.outvars, names)


def same_equations(these, those, names) -> bool:
    """Whether two lists of equations compute the same; ``names`` maps variables, and grows."""
    return len(these) == len(those) and all(same_equation(*e, names) for e in zip(these, those))


def same_equation(p, q, names) -> bool:
    """Whether an equation is another one, its operands renamed; its results get their names."""
    if p.primitive is not q.primitive or not _same_atoms(p.invars, q.invars, names):
        return False
    if len(p.outvars) != len(q.outvars) or not _same_params(p, q):
        return False
    names.update(zip(p.outvars, q.outvars))
    return True


def _same_atoms(xs, ys, names):
    return len(xs) == len(ys) and all(
        names.get(x) is y
        if is_var(x) and is_var(y)
        else is_var(x) == is_var(y) and _same_value(x.val, y.val)
        for x, y in zip(xs, ys)
    )


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
