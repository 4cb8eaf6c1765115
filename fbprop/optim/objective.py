"""What a loss function returns, read in one place for everything that trains."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.optim.transform import wide


class Weighted(NamedTuple):
    """A mean over something that batches have different amounts of: the tokens that count, say.

    As a loss or a metric it stands for ``sum / weight``; over several batches (gradient
    accumulation, evaluation) for the sum of sums divided by the sum of weights, which is the mean
    over all tokens, and not the mean of the batches' means. A weight of 0 gives 0.

    Attributes:
      sum: scalar. Of a loss computed in float16, add up in float32: 65,504 is its largest number.
      weight: scalar, a constant to differentiation.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import train
      >>> losses, real = jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False])
      >>> loss = train.Weighted(jnp.sum(losses, where=real), jnp.sum(real))
      >>> float(loss.mean)
      1.5
    """

    sum: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        """sum / weight, float32 at least."""
        total = number(self.sum)
        return total * self.inverse(total.dtype)

    def inverse(self, dtype) -> jax.Array:
        """1 / weight, without a division by 0."""
        weight = jax.lax.stop_gradient(jnp.asarray(self.weight)).astype(dtype)
        return jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))


class Outcome(NamedTuple):
    """What one call of a loss returned.

    Attributes:
      value: a scalar or `Weighted`.
      metrics: dict of arrays and `Weighted`.
      model_state: what the model carries from step to step besides parameters; None without.
    """

    value: Any
    metrics: dict[str, Any]
    model_state: Any


def call_loss(loss, params, batch, key, model_state=None) -> Outcome:
    """Calls a loss function by the convention that `fbprop.train.step` states."""
    arguments = (params, batch, key) + (() if model_state is None else (model_state,))
    out = _called(loss, arguments)
    if model_state is None:
        paired = isinstance(out, tuple) and not isinstance(out, Weighted) and len(out) == 2
        value, metrics = out if paired else (out, {})
        form, new = "a scalar or (scalar, dict of metrics)", None
    else:
        paired = isinstance(out, tuple) and len(out) == 3
        value, metrics, new = out if paired else (out, None, None)
        form = "(scalar, dict of metrics, model state), as the state has one"
    if not isinstance(metrics, dict) or not _is_number(value):
        raise TypeError(
            f"A loss returns {form}, got {_kinds(out)} expected one of these: put what you want "
            "reported into the dict, and a mean over tokens as fbprop.train.Weighted(sum, weight)."
        )
    total = value.sum if isinstance(value, Weighted) else value
    if jnp.shape(total) or not jnp.issubdtype(jnp.result_type(total), jnp.floating):
        raise TypeError(
            f"A loss is one real number, got {_say(jnp.asarray(total))} expected a floating "
            "scalar: reduce it, with jnp.mean say, and convert integers with astype."
        )
    if not all(_is_number(m) for m in jax.tree.leaves(metrics)):
        raise TypeError(
            f"Metrics are arrays, got {tree_map(_say, metrics)} expected a dict of arrays: leave "
            "what is no number out of it."
        )
    if "loss" in metrics:
        raise ValueError(
            'metrics["loss"] is the loss itself, got a metric of that name from the loss function; '
            "expected another name: rename it."
        )
    return Outcome(value, metrics, _same_form(new, model_state))


def _called(loss, arguments):
    """``loss(*arguments)``; what is wrong with the call is said in the loss's own terms."""
    names = ["params", "batch", "key", "model_state"][:len(arguments)]
    call = f"loss({', '.join(names)})"
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # of something written in C, or not callable
        signature = None
    if not callable(loss) or (signature is not None and not _takes(signature, arguments)):
        got = type(loss).__name__ if signature is None else f"one of the form {signature}"
        raise TypeError(
            f"A loss is called as {call}, got {got} expected a function of {len(names)} arguments: "
            f"def {call}, whether it reads them all or not; a state from init(..., "
            "model_state=...) adds the fourth."
        )
    try:
        return loss(*arguments)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        form = tree_map(_say, arguments[1])
        if all(jnp.ndim(x) == 0 for x in jax.tree.leaves(arguments[1])):
            raise TypeError(
                f"A loss reads the batches that the data are made of, got a batch {form} without "
                f"an array in it, which it fails on ({error}); expected batches of the form that "
                "the loss takes: pass those as data, or arrays and batch_size."
            ) from error
        error.add_note(f"The loss was called with a batch of the form {form}.")
        raise


def _takes(signature, arguments) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _say(x):
    return jax.typeof(x).str_short() if hasattr(x, "dtype") else type(x).__name__


def _is_number(value) -> bool:
    """Whether a loss may be this: a `Weighted`, an array, a Python number."""
    if isinstance(value, Weighted):
        return True
    return hasattr(value, "dtype") or isinstance(value, (bool, int, float, complex))


def number(x) -> jax.Array:
    """``x`` as a float to add up, float32 at least."""
    x = jnp.asarray(x)
    return wide(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def mean_of(value) -> jax.Array:
    """A scalar as it is, the mean of a `Weighted`."""
    return value.mean if isinstance(value, Weighted) else value


def means_of(metrics):
    """A pytree of metrics with every `Weighted` replaced by its mean."""
    return tree_map(mean_of, metrics, is_leaf=lambda m: isinstance(m, Weighted))


def _same_form(new, old):
    """The new model state in the old one's dtypes; an error if it has another form."""
    tree, expected = jax.tree.structure(new), jax.tree.structure(old)
    got, wanted = ([jnp.shape(x) for x in jax.tree.leaves(s)] for s in (new, old))
    if tree != expected or got != wanted:
        raise ValueError(
            f"A model state keeps its form from step to step, got {tree} with shapes {got} "
            f"expected {expected} with shapes {wanted}: return the updated one as the third result."
        )
    return tree_map(lambda n, o: jnp.asarray(n).astype(jnp.asarray(o).dtype), new, old)


def _kinds(out):
    if isinstance(out, tuple):
        return f"({', '.join(type(x).__name__ for x in out)})"
    return type(out).__name__
