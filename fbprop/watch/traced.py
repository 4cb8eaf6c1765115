"""A function of some of its arguments, traced and planned before it runs."""

from __future__ import annotations

import inspect

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from fbprop.core import jaxcompat as jc
from fbprop.core.arguments import cotangent_one
from fbprop.core.engine import Engine, Flow, Plan
from fbprop.core.halves import inlined


class Traced:
    """A scalar function of its arguments' arrays, of which the chosen ones are differentiated.

    Attributes:
      plan: of a jaxpr whose inputs are the leaves of the chosen arguments and then the arrays among
        the others' leaves, and whose first result is the scalar.
      leaves, others: these inputs; names: of all of them.
    """

    def __init__(self, fun, args, kwargs, chosen, has_aux, table, fallback):
        self.leaves, self.tree = tree_flatten([args[i] for i in chosen])
        rest = {i: x for i, x in enumerate(args) if i not in chosen}
        flat_rest, rest_tree = tree_flatten((rest, kwargs))
        arrays = [i for i, x in enumerate(flat_rest) if _is_array(x)]
        self.others = [flat_rest[i] for i in arrays]
        self.names = names_of(fun, {i: args[i] for i in chosen}, chosen, rest, kwargs)

        def flat(*values):
            first, given = values[: len(self.leaves)], list(flat_rest)
            for i, x in zip(arrays, values[len(self.leaves) :]):
                given[i] = x
            at, named = tree_unflatten(rest_tree, given)
            at = at | dict(zip(chosen, tree_unflatten(self.tree, first)))
            return self._flat_results(fun(*(at[i] for i in range(len(args))), **named), has_aux)

        flat.__wrapped__ = fun
        jaxpr = inlined(jax.make_jaxpr(flat)(*self.leaves, *self.others), table)
        active = (True,) * len(self.leaves) + (False,) * len(self.others)
        flow = Flow(Engine(table, fallback), jc.runnable(jaxpr), active, "")
        wanted = (True, *(False for _ in jc.out_avals(jaxpr)[1:]))
        self.plan = Plan(flow, wanted, (), at_hand=True)

    def _flat_results(self, out, has_aux):
        value, aux = _pair(out) if has_aux else (out, ())
        extras, self.aux_tree = tree_flatten(aux)
        traced = [isinstance(x, jax.core.Tracer) for x in extras]
        # What aux holds besides traced values (a string, a NumPy array) is handed back as it is.
        self.static = [None if t else (x,) for x, t in zip(extras, traced)]
        if isinstance(value, (float, int)) and not isinstance(value, bool):
            value = jax.numpy.asarray(value, float)
        cotangent_one(value, False)
        return [value, *(x for x, t in zip(extras, traced) if t)]

    def inputs(self, chosen):
        """The plan's arguments, of the differentiated ones."""
        return [*tree_leaves(chosen), *self.others]

    def aux(self, outs):
        """The function's aux, of the plan's results."""
        arrays = iter(outs[1:])
        return tree_unflatten(
            self.aux_tree, [next(arrays) if s is None else s[0] for s in self.static]
        )


def _is_array(x):
    kinds = jax.Array, np.ndarray, np.generic
    return isinstance(x, kinds) and getattr(x.dtype, "kind", "V") not in "OSU"


def names_of(fun, chosen_args, chosen, rest, kwargs):
    """How to speak of the inputs: ``"argument params['w']"``."""
    def of(start, tree, only=lambda x: True):
        found = tree_flatten_with_path(tree)[0]
        return [f"argument {start}{keystr(path)}" for path, x in found if only(x)]

    called = _parameters(fun, 1 + max((*chosen, *rest), default=0))
    first = [name for i in chosen for name in of(called[i], chosen_args[i])]
    others = [name for i in sorted(rest) for name in of(called[i], rest[i], _is_array)]
    return first + others + [n for k in sorted(kwargs) for n in of(k, kwargs[k], _is_array)]


def _parameters(fun, n):
    """What a function calls its n positional arguments, numbers where that is not known."""
    try:
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        found = [p.name for p in inspect.signature(fun).parameters.values() if p.kind in kinds]
    except (TypeError, ValueError):
        found = []
    return (found + [*range(len(found), n)])[:n]


def _pair(out):
    if not (isinstance(out, (tuple, list)) and len(out) == 2):
        raise TypeError(
            "With has_aux=True the function returns a pair (out, aux), got "
            f"{type(out).__name__} expected a tuple of length 2."
        )
    return out
