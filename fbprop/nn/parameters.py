"""Counting parameters and parting them by path."""

from __future__ import annotations

import math
from typing import Any

import jax

from fbprop.optim.chain import hold
from fbprop.optim.paths import select


def count_parameters(params) -> int:
    """How many numbers a pytree of arrays (or of shapes) holds; None counts as nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> nn.count_parameters({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
      9
    """
    return sum(math.prod(p.shape) for p in jax.tree.leaves(params))


def partition(params, where) -> tuple[Any, Any]:
    """The chosen parameters and the others: two trees like ``params``, with None in the gaps.

    To differentiate with respect to the chosen: ``fbprop.grad(lambda p: loss(combine(p, rest)))``.
    To train them only, freeze the others in the optimiser: `fbprop.optim.freeze`.

    Args:
      params: pytree of arrays.
      where: a pattern on paths, ``"encoder/*"``, or several; a pytree of bools, or a function to
        one; see `fbprop.optim.select`.

    Raises:
      ValueError: a pattern that matches no path.

    Example:
      >>> from fbprop import nn
      >>> nn.partition({"encoder": {"w": 1.0}, "head": {"w": 2.0}}, "head/*")
      ({'encoder': {'w': None}, 'head': {'w': 2.0}}, {'encoder': {'w': 1.0}, 'head': {'w': None}})
    """
    chosen = select(where, params)
    return hold(chosen, params), hold(jax.tree.map(lambda mine: not mine, chosen), params)


def combine(*parts):
    """The inverse of `partition`: of each leaf the one that is not None.

    Args:
      *parts: pytrees of the same structure but for the Nones.

    Raises:
      ValueError: a leaf that several parts have.

    Example:
      >>> from fbprop import nn
      >>> nn.combine({"a": 1.0, "b": None}, {"a": None, "b": 2.0})
      {'a': 1.0, 'b': 2.0}
    """

    def one(path, *leaves):
        found = [leaf for leaf in leaves if leaf is not None]
        if len(found) > 1:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"Each parameter is in one of the parts, got {where!r} in {len(found)} of them "
                "expected 1: combine what one call of partition returned."
            )
        return found[0] if found else None

    return jax.tree_util.tree_map_with_path(one, *parts, is_leaf=lambda leaf: leaf is None)
