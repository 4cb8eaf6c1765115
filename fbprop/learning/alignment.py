"""How good a direction is: what it has in common with the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves, tree_map

from fbprop.core.factored import dense
from fbprop.core.precision import at_least_float32
from fbprop.learning.method import Method, check_method
from fbprop.reverse import grad


class Alignment(NamedTuple):
    """What a direction has in common with the gradient.

    Attributes:
      cosine: per parameter, cos of the angle between them; 0 where either is 0.
      ratio: per parameter, norm of the direction over norm of the gradient; nan where both are 0.
      total: the cosine over all parameters.
    """

    cosine: Any
    ratio: Any
    total: jax.Array


def alignment(method: Method, loss: Callable, has_aux: bool = False, **options) -> Callable:
    """Cosine and norm ratio of a rule's direction to the true gradient, per parameter.

    Args:
      method: a learning rule; loss, has_aux, **options: as for `Method.value_and_grad`.

    Returns:
      A jitted function ``(params, *args, memory) -> Alignment``; the memory is not changed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> loss, w = lambda w: jnp.sum(w ** 2), jnp.array([3.0, -4.0])
      >>> method = learning.backprop()
      >>> found = learning.alignment(method, loss)(w, memory=())
      >>> round(float(found.cosine), 4), float(found.ratio)
      (1.0, 1.0)
    """
    check_method(method)

    @jax.jit
    def aligned(params, *args, memory):
        run = method.value_and_grad(loss, has_aux, **options)
        (_, direction), _ = run(params, *args, memory=memory)
        gradient = dense(grad(loss, has_aux=has_aux, **options)(params, *args))
        gradient = gradient[0] if has_aux else gradient
        return compared(dense(direction), gradient)

    return aligned


def compared(direction, gradient) -> Alignment:
    """The same, of two trees."""
    def product(a, b):
        return jnp.sum(at_least_float32(a) * at_least_float32(b))

    dots, lengths, true = (
        tree_map(product, *pair)
        for pair in ((direction, gradient), (direction, direction), (gradient, gradient))
    )
    total = sum(tree_leaves(dots)), sum(tree_leaves(lengths)), sum(tree_leaves(true))
    return Alignment(
        tree_map(_cosine, dots, lengths, true),
        tree_map(lambda d, g: jnp.sqrt(d) / jnp.sqrt(g), lengths, true), _cosine(*total),
    )


def _cosine(dot, a, b):
    length = jnp.sqrt(a) * jnp.sqrt(b)
    return jnp.where(length > 0, dot / jnp.where(length > 0, length, 1), 0)
