"""Networks as a sequence of layers, for learning rules that look at one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from fbprop.learning.method import Method


def halves(*args):
    """What a layered network takes from a loss's arguments: inputs and targets.

    These are the first two arguments, or the two parts of a first one that is a pair.
    """
    if args and isinstance(args[0], (tuple, list)) and len(args[0]) == 2:
        return args[0][0], args[0][1]
    if len(args) < 2:
        raise ValueError(
            "A layered network has inputs and targets, got a loss of "
            f"{len(args)} arguments besides the parameters; expected (params, x, y), or split=..., "
            "a function from the arguments to the pair."
        )
    return args[0], args[1]


def layered(layers: Sequence[Callable], init: Callable, direction: Callable, split=None) -> Method:
    """A rule for networks ``layers[-1](params[-1], ... layers[0](params[0], x))``.

    Args:
      init: ``(key, params, x, y) -> memory``.
      direction: ``(params, x, y, memory, options) -> (direction, memory)``.
      split: ``*args -> (x, y)``; see `halves`.
    """
    layers = check_layers(layers)
    split = halves if split is None else split

    def start(key, loss, params, *args):
        check_parts(layers, params)
        return init(key, params, *split(*args))

    def value_and_direction(loss, has_aux, options, params, args, memory):
        check_parts(layers, params)
        found, memory = direction(params, *split(*args), memory, options)
        leaves = jax.tree.leaves(found)
        return (loss(params, *args), jax.tree.unflatten(jax.tree.structure(params), leaves)), memory

    return Method(start, value_and_direction)


def check_layers(layers) -> list[Callable]:
    layers = list(layers) if isinstance(layers, (list, tuple)) else layers
    if not (isinstance(layers, list) and layers and all(map(callable, layers))):
        raise TypeError(
            f"A layered network is a list of functions (params, h) -> h, got {layers!r} expected "
            "e.g. [layer.apply for layer in (nn.dense(300), nn.dense(10))]."
        )
    return layers


def check_parts(layers, params):
    if not isinstance(params, (list, tuple)) or len(params) != len(layers):
        got = len(params) if hasattr(params, "__len__") else "no length"
        raise ValueError(
            "Parameters of a layered network are a list with one part per layer, got "
            f"{type(params).__name__} of {got} expected {len(layers)}."
        )


def activities(layers, params, x) -> list:
    """x and every layer's result."""
    found = [x]
    for layer, p in zip(layers, params):
        found.append(layer(p, found[-1]))
    return found
