"""What a learning rule is: data, as an optimiser is. Explicit memory, and a direction by a loss."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax

from fbprop.core.arguments import check_function
from fbprop.reverse import value_and_grad

# What is drawn here is not what parameters were drawn from, should the key have been the same: of
# a weight from ``split(key)[i]`` a feedback weight from ``fold_in(key, i)`` would be a multiple.
SALT = zlib.crc32(b"fbprop.learning")


class Method:
    """A learning rule.

    Args:
      init: ``(key, loss, params, *args) -> memory``, a pytree of arrays: what the rule remembers
        from step to step besides the parameters.
      value_and_direction: ``(loss, has_aux, options, params, args, memory) -> ((value, direction),
        memory)``; options are those of `fbprop.value_and_grad`, ``rules`` and ``fallback``.
      update: ``(updates, params, memory) -> (updates, memory)``, or None: what the memory learns
        from the parameters' updates.

    Example: signs of the gradient, in a rule of one's own.
      >>> import fbprop, jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> def signs(loss, has_aux, options, params, args, memory):
      ...     run = fbprop.value_and_grad(loss, has_aux=has_aux, **options)
      ...     value, gradient = run(params, *args)
      ...     return (value, jax.tree.map(jnp.sign, gradient)), memory + 1
      >>> method = learning.Method(lambda key, loss, params, *args: jnp.zeros((), int), signs)
      >>> loss, w = lambda w: jnp.sum(w ** 2), jnp.array([3.0, -2.0])
      >>> memory = method.init(jax.random.key(0), loss, w)
      >>> (_, direction), memory = method.value_and_grad(loss)(w, memory=memory)
      >>> direction.tolist(), int(memory)
      ([1.0, -1.0], 1)
    """

    def __init__(self, init: Callable, value_and_direction: Callable,
                 update: Callable | None = None):
        self._init, self._value_and_direction, self._update = init, value_and_direction, update

    def init(self, key, loss: Callable, params, *args) -> Any:
        """The memory before the first step.

        Args:
          key: from `jax.random.key`.
          loss: the loss to be trained with, ``(params, *args) -> scalar``.
          params, *args: what it is called with; of the arguments only types matter.
        """
        check_function(loss)
        return self._init(jax.random.fold_in(key, SALT), loss, params, *args)

    def value_and_grad(self, loss: Callable, has_aux: bool = False, **options) -> Callable:
        """``(params, *args, memory) -> ((value, direction), memory)``.

        The direction stands where a gradient would: an optimiser takes it as one. ``memory`` is a
        keyword, so that the loss's arguments stay its own.

        Args:
          loss: ``(params, *args) -> scalar``; with ``has_aux``, ``(scalar, aux)``, and the value
            is then that pair. It is traced as under `jax.jit`.
          **options: ``rules`` and ``fallback``, as for `fbprop.value_and_grad`.
        """
        check_function(loss)

        @functools.wraps(loss, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        def value_and_direction(params, *args, memory):
            return self._value_and_direction(loss, has_aux, options, params, args, memory)

        return value_and_direction

    def update(self, updates, params, memory) -> tuple[Any, Any]:
        """What becomes of an optimiser's updates and of the memory: both as they are, in most.

        Args:
          updates: what is about to be added to the parameters; params: before that.

        Returns:
          ``(updates, memory)``.
        """
        return (updates, memory) if self._update is None else self._update(updates, params, memory)


def backprop() -> Method:
    """The gradient itself: `fbprop.value_and_grad`, bit for bit. It remembers nothing.

    Example:
      >>> import jax
      >>> from fbprop import learning
      >>> method = learning.backprop()
      >>> loss = lambda w: w ** 2
      >>> memory = method.init(jax.random.key(0), loss, 3.0)
      >>> (value, gradient), memory = method.value_and_grad(loss)(3.0, memory=memory)
      >>> float(value), float(gradient)
      (9.0, 6.0)
    """
    return BACKPROP


def _gradient(loss, has_aux, options, params, args, memory):
    return value_and_grad(loss, has_aux=has_aux, **options)(params, *args), memory


BACKPROP = Method(lambda key, loss, params, *args: (), _gradient)


def check_method(method):
    if not isinstance(method, Method):
        raise TypeError(
            f"A learning rule is a learning.Method, got {type(method).__name__} expected one such "
            "as learning.feedback_alignment()."
        )
