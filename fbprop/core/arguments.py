"""What `grad` may be called with, and what its function may return: as JAX has it."""

from __future__ import annotations

import inspect
import operator

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves


def check_function(fun):
    if isinstance(fun, staticmethod) or not callable(fun) or inspect.isgeneratorfunction(fun):
        raise TypeError(
            f"What is differentiated is a function that returns its value, got {fun!r} expected a "
            "callable, and no generator function or staticmethod object."
        )


def indices(argnums) -> tuple[tuple[int, ...], bool]:
    """Argument numbers, and whether there may be several: an index is one, a sequence several."""
    try:
        return (operator.index(argnums),), False
    except TypeError:
        pass
    try:
        return tuple(map(operator.index, argnums)), True
    except TypeError:
        raise TypeError(
            f"argnums are positions of arguments, got {argnums!r} expected an integer or a "
            "sequence of integers."
        ) from None


def positions(numbers, args):
    if not numbers:
        raise ValueError("argnums are positions of arguments, got none expected one or more.")
    if max(numbers) >= len(args):
        raise TypeError(
            f"differentiating with respect to argnums={numbers} requires at least "
            f"{max(numbers) + 1} positional arguments to be passed by the caller, but got only "
            f"{len(args)} positional arguments: keyword arguments are not differentiated."
        )
    if min(numbers) < -len(args):
        raise ValueError(
            f"argnums are positions of arguments, got {min(numbers)} expected at least "
            f"{-len(args)} with {len(args)} positional arguments."
        )
    return [n % len(args) for n in numbers]


def check_input(dtype, holomorphic, allow_int):
    if holomorphic:
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                "grad with holomorphic=True requires inputs with complex dtype, but got "
                f"{dtype.name}."
            )
    elif not jnp.issubdtype(dtype, jnp.inexact) and not allow_int:
        raise TypeError(
            "grad requires real- or complex-valued inputs (input dtype that is a sub-dtype of "
            f"np.inexact), but got {dtype.name}. If you want to use Boolean- or integer-valued "
            "inputs, use vjp or set allow_int to True."
        )


def cotangent_one(value, holomorphic):
    """The cotangent 1 of a scalar loss, or what is wrong with the loss."""
    leaves = tree_leaves(value)
    if len(leaves) != 1 or not isinstance(value, jax.Array):
        raise TypeError(f"Gradient only defined for scalar-output functions. Output was {value}.")
    if value.shape != ():
        raise TypeError(
            f"Gradient only defined for scalar-output functions. Output had shape: {value.shape}."
        )
    if holomorphic and not jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(
            "grad with holomorphic=True requires outputs with complex dtype, but got "
            f"{value.dtype.name}."
        )
    if not holomorphic and not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            "grad requires real-valued outputs (output dtype that is a sub-dtype of np.floating), "
            f"but got {value.dtype.name}. For holomorphic differentiation, pass holomorphic=True; "
            "for other complex or integer outputs, use vjp."
        )
    return jnp.ones((), value.dtype)
