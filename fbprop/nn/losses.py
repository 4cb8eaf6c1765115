"""Losses and metrics: means over all examples, scalars; `jax.vmap` gives one per example."""

from __future__ import annotations

import jax.numpy as jnp

from fbprop import ops
from fbprop.core.precision import at_least_float32
from fbprop.nn.shapes import counted, mean


def softmax_cross_entropy(logits, labels, *, label_smoothing: float = 0.0, where=None):
    """Mean of −log softmax(logits)[label].

    `fbprop.ops.softmax_cross_entropy` of each row of logits: large ones do not overflow, kept are
    logits and a number per row; in float32 at least. With label smoothing ε (Szegedy et al. 2016)
    the target is 1 − ε on the label plus ε / C on each of the C classes.

    Args:
      logits: [..., C], floating.
      labels: [...], integers in 0..C−1; a label outside gives NaN.
      label_smoothing: ε in [0, 1).
      where: [...], bool; which examples count (padding does not). Default: all. What does not
        count may hold anything, and gets gradient 0; if nothing counts, so is the loss.

    Returns:
      A scalar in nats, float32 for 16-bit logits, otherwise their dtype.

    Raises:
      TypeError: labels are not integers.   ValueError: shapes do not fit together;
        label_smoothing out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> float(nn.softmax_cross_entropy(jnp.zeros((3, 2)), jnp.array([0, 1, 1]))).__round__(4)
      0.6931
    """
    _check_labels("softmax_cross_entropy", logits, labels)
    if where is not None:
        labels = counted(where, labels)
        logits = counted(jnp.asarray(where)[..., None], logits)
    losses = ops.softmax_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return mean(losses, where)


def mean_squared_error(predictions, targets, *, where=None):
    """Mean of (prediction − target)² over all elements, in float32 at least.

    Args:
      predictions, targets: the same shape and dtype.
      where: bool, same shape or broadcast to it; which elements count. Default: all. What does
        not count may hold anything, and gets gradient 0; if nothing counts, so is the loss.

    Returns:
      A scalar, float32 for 16-bit predictions, otherwise their dtype.

    Raises:
      ValueError: the shapes differ (broadcasting [n] against [n, 1] would average n² pairs).

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> float(nn.mean_squared_error(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])))
      2.0
    """
    if jnp.shape(predictions) != jnp.shape(targets):
        raise ValueError(
            "mean_squared_error compares arrays of one shape, got targets of shape "
            f"{jnp.shape(targets)} expected {jnp.shape(predictions)}: reshape one of them."
        )
    predictions, targets = (at_least_float32(counted(where, x)) for x in (predictions, targets))
    return mean(jnp.square(predictions - targets), where)


def accuracy(logits, labels, *, where=None):
    """Share of examples whose largest logit is the label's, the first of equals, as float32.

    Args:
      logits: [..., C].    labels: [...], integers.
      where: [...], bool; which examples count. Default: all. If none does, it is 0.

    Raises:
      TypeError: labels are not integers.   ValueError: shapes do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> float(nn.accuracy(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([1, 1])))
      0.5
    """
    _check_labels("accuracy", logits, labels)
    right = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
    return mean(right.astype(jnp.float32), where)


def _check_labels(name, logits, labels):
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{name} takes class numbers, got labels of dtype {labels.dtype.name} expected "
            "integers: take the argmax of one-hot labels."
        )
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} takes one label per row of logits, got labels of shape {labels.shape} "
            f"expected {logits.shape[:-1]} for logits of shape {logits.shape}."
        )
