"""Parameters by path: names, which of them a pattern means, and what is wrong with it.

A parameter's path is its keys in the pytree joined by ``/``: ``"encoder/0/w"``. Patterns are
shell-style and case-sensitive, as those of `fbprop.Table.override` and `fbprop.optim.by_path`.
"""

from __future__ import annotations

import difflib
import fnmatch

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path


def names_of(params) -> list[str]:
    """The paths of a pytree's leaves, in order."""
    found, _ = tree_flatten_with_path(params)
    return [keystr(path, simple=True, separator="/") for path, _ in found]


def assigned(patterns, names) -> list[int]:
    """Per name the number of the first pattern that matches it.

    Raises:
      ValueError: a pattern matches nothing, one hides another, or a name has none.
    """
    found = [
        next((k for k, p in enumerate(patterns) if fnmatch.fnmatchcase(name, p)), None)
        for name in names
    ]
    for k, pattern in enumerate(patterns):
        matching = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, names, 3, 0.0)
            raise ValueError(
                f"A pattern selects at least one parameter, got {pattern!r}, which matches none; "
                f"expected one that does: the nearest paths are {near}."
            )
        if k not in found:
            first = patterns[found[names.index(matching[0])]]
            raise ValueError(
                f"A parameter has one learning rule, got {pattern!r} after {first!r}, which takes "
                f"{matching[0]!r} and all else that it matches: expected the special pattern "
                "before the general one."
            )
    if None in found:
        raise ValueError(
            f"Every parameter has a learning rule, got {names[found.index(None)]!r}, which no "
            "pattern matches: add '*' as the last pattern, with learning.backprop() for the rest."
        )
    return found


def check_memory(memory, expected: dict):
    """That a memory, a dict by path, is of these weights.

    Args:
      expected: types of their states, by path.
    """
    if not isinstance(memory, dict):
        raise TypeError(
            f"A method's memory is what its init returned, got {type(memory).__name__} expected a "
            "dict by path: memory = method.init(key, loss, params, *args)."
        )
    for path, state in memory.items():
        got, wanted = _types(state), _types(expected.get(path))
        if path not in expected or got != wanted:
            raise ValueError(
                f"A method's memory belongs to one network, got one of {path!r} with {got} "
                f"expected {wanted if path in expected else 'no such path'}: make it with "
                "method.init(key, loss, params, *args) of these parameters."
            )


def _types(state):
    leaves = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in jax.tree.leaves(state)]
    return [f"{_kind(x.dtype)}{list(x.shape)}" for x in leaves]


def _kind(dtype):
    """A type's name; random keys are of one kind, whoever makes their numbers."""
    return "key" if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.name
