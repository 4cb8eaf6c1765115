"""A loss traced once and run again with another backward pass through the weights of some paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import tree_flatten, tree_leaves, tree_unflatten

from fbprop.core import jaxcompat as jc
from fbprop.learning.names import names_of
from fbprop.learning.trace import Trace
from fbprop.learning.value import DATA, Mark, Value


class Loss(NamedTuple):
    """A loss as a jaxpr.

    Attributes:
      jaxpr: from the leaves of parameters and arguments to those of the result.
      names: of the parameters; tree: their structure.
      args: leaves of the arguments.
      out_tree: structure of the result.
    """

    jaxpr: Any
    names: list[str]
    tree: Any
    args: list
    out_tree: Any

    def run(self, leaves, product: Callable, feedback: dict[int, Any], every=False):
        """The result with this handling of products, and what was noted of them.

        Args:
          leaves: of the parameters.
          product: see `Trace`.
          feedback: by number of the leaf, of those whose products have feedback.
        """
        values = []
        for i, x in enumerate(leaves):
            served = i in feedback and jc.differentiable(jax.typeof(x))
            mark = Mark("weight" if served else "parameter", frozenset((i,)))
            values.append(Value(x, mark, feedback[i] if served else None))
        values += [Value(x, DATA) for x in self.args]
        # A loss without arguments has its data from around it.
        trace = Trace(product, Mark() if self.args else DATA, every)
        outs = trace.run(self.jaxpr, values)
        return tree_unflatten(self.out_tree, [o.array for o in outs]), trace.noted

    def result(self, *args, **options):
        """The result alone."""
        return self.run(*args, **options)[0]


def traced(loss: Callable, params, args) -> Loss:
    """The loss as equations; it is called once."""
    leaves, tree = tree_flatten(params)
    arg_leaves, arg_tree = tree_flatten(args)
    seen = {}

    def flat(leaves, arg_leaves):
        out = loss(tree_unflatten(tree, leaves), *tree_unflatten(arg_tree, arg_leaves))
        outs, seen["tree"] = tree_flatten(out)
        return outs

    jaxpr = jax.make_jaxpr(flat)(leaves, arg_leaves)
    return Loss(jaxpr, names_of(params), tree, arg_leaves, seen["tree"])


class Use(NamedTuple):
    """A product of data with a weight.

    Attributes:
      place: where it stands, see `Trace`.
      leaves: numbers of the parameters that the weight is made of.
      at: which operand the weight is.
      x, w, y: types of the data, the weight and the product.
      active: whether the data depend on parameters, so that they get a cotangent.
    """

    place: tuple
    leaves: frozenset
    at: int
    x: Any
    w: Any
    y: Any
    active: bool


def uses_of(loss: Loss, params, numbers, every=False) -> list[Use]:
    """The products of data with weights, in order; these leaves are those that have feedback.

    Args:
      every: also those with other parameters.

    Raises:
      ValueError: a product of theirs is of a form that has no feedback weight.
    """
    found = {}

    def product(eqn, values, at, place):
        outs, x, w = jc.bind(eqn, [v.array for v in values]), values[1 - at], values[at]
        types = (jax.typeof(a) for a in (x.array, w.array, outs[0]))
        found[place] = Use(place, w.mark.leaves, at, *types, bool(x.mark.leaves))
        return outs

    def run(leaves):
        return loss.result(leaves, product, {i: leaves[i] for i in numbers}, every)

    jax.eval_shape(run, tree_leaves(params))
    return list(found.values())
