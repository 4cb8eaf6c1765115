"""What callers pass to optimisers, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from fbprop.core.factored import is_factored


def passes(name: str, value, test: Callable[[float], bool]) -> bool:
    """Whether a number passes a test; one that is traced does, because nobody knows it yet.

    Raises:
      TypeError: no number.
    """
    if isinstance(value, jax.core.Tracer):
        return True
    if np.ndim(value) or not np.issubdtype(getattr(value, "dtype", type(value)), np.number):
        raise TypeError(
            f"{name} is a number, got {value!r} of type {type(value).__name__} expected a Python "
            "number or a scalar array."
        )
    return bool(test(value))


def check_decay(name, value):
    """For decay rates of running averages."""
    if not passes(name, value, lambda v: 0 <= v < 1):
        raise ValueError(
            f"{name} is the decay of a running average, got {value} expected 0 <= {name} < 1."
        )


def check_least(least=0, **values):
    """For finite numbers that have a least value; each is called by its keyword."""
    for name, value in values.items():
        if not passes(name, value, lambda v: least <= v < np.inf):
            raise ValueError(
                f"{name} is a finite number, got {name}={value} expected it >= {least}."
            )


def check_count(name, value, least=1):
    if not passes(name, value, lambda v: v == np.floor(v) and v >= least):
        raise ValueError(
            f"{name} is a count, got {name}={value} expected an integer >= {least}."
        )


def numbers(tree, name: str):
    """``tree`` with arrays in place of Python numbers.

    Raises:
      TypeError: a leaf that no optimiser can move: an integer, a string.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_factored)
    leaves = [x if hasattr(x, "dtype") else _array(x) for x in leaves]
    for i, x in enumerate(leaves):
        if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)):
            path = path_of(tree, i)
            raise TypeError(
                f"Optimisers move real and complex numbers, got {name} {path!r} of {_type(x)} "
                "expected a floating or complex dtype: freeze a parameter that does not learn, "
                f"fbprop.optim.freeze(optimizer, {path!r}), or keep it out of the tree; and call "
                "init(params), update(grads, state, params)."
            )
    return jax.tree.unflatten(structure, leaves)


def check_alike(got, expected, what: str, like: str):
    """Refuses trees of two forms, and names the first leaf in which they differ."""
    mine, theirs = (jax.tree.flatten(t, is_leaf=is_factored) for t in (got, expected))
    if mine[1] == theirs[1] and all(_fits(a, b) for a, b in zip(mine[0], theirs[0])):
        return
    mine, theirs = _named(got), _named(expected)
    for path in [*mine, *theirs]:
        a, b = mine.get(path), theirs.get(path)
        if a is None or b is None or not _fits(a, b):
            raise ValueError(_differ(what, like, _say(path, a), _say(path, b)))
    raise ValueError(
        _differ(what, like, *(str(jax.tree.structure(t)) for t in (got, expected)))
    )


def check_state(state, kind: type, ok: bool = True):
    if not (isinstance(state, kind) and ok):
        raise ValueError(
            f"An optimiser goes on from its own state, got {type(state).__name__} expected the "
            f"{kind.__name__} that its init made: use init(params) of this very optimiser, and "
            "then what each update returns."
        )


def path_of(tree, i: int) -> str:
    """The path of a leaf, by its number."""
    return [*_named(tree)][i]


def _named(tree):
    found, _ = tree_flatten_with_path(tree, is_leaf=is_factored)
    return {keystr(path, simple=True, separator="/"): x for path, x in found}


def _fits(got, expected):
    return np.shape(got) == np.shape(expected) and (
        _is_complex(expected) or not _is_complex(got)
    )


def _is_complex(x):
    return jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.complexfloating)


def _array(x):
    return jnp.asarray(x) if isinstance(x, (bool, int, float, complex)) else x


def _differ(what, like, got, expected):
    return (
        f"{what} have the form of {like}, got {got} expected {expected}: pass the trees of one "
        "and the same model."
    )


def _say(path, x):
    return f"nothing at {path!r}" if x is None else f"{path!r} of {_type(x)}"


def _type(x):
    if not hasattr(x, "dtype"):
        return type(x).__name__
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"
