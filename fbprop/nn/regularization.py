"""Layers that act only in training."""

from __future__ import annotations

from fbprop import ops
from fbprop.nn.layer import Layer


def dropout(rate: float, *, name: str = "dropout") -> Layer:
    """Zeroes each element with probability ``rate`` in training, scaling the others by 1/(1−rate).

    Without ``train=True`` the input passes unchanged: the scaling keeps its expectation the same
    (Srivastava et al. 2014, the "inverted" form).

    Args:
      rate: probability of being dropped, in [0, 1).

    Raises:
      ValueError: rate out of range; `apply` with ``train=True`` and no key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> y = nn.dropout(0.5).apply({}, jnp.ones(1000), key=jax.random.key(0), train=True)
      >>> sorted(set(y.tolist()))
      [0.0, 2.0]
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"dropout's rate is the probability of dropping an element, got {rate} expected a "
            "number in [0, 1)."
        )

    def apply(params, x, *, key, train):
        if not train or rate == 0:
            return x
        check_key(name, key)
        return ops.dropout(x, rate, key)

    return Layer(lambda key, x: {}, apply, name)


def check_key(name: str, key) -> None:
    """Raises if a layer that draws random numbers in training has no key."""
    if key is None:
        raise ValueError(
            f"Layer {name!r} draws random numbers in training, got key=None with train=True "
            "expected a random key: call apply(params, x, key=key, train=True)."
        )
