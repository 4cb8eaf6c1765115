"""Checks that several operations share."""

import jax.numpy as jnp


def floating(name: str, x):
    """``x`` as an array; raises TypeError unless it is of floating numbers."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} takes floating numbers, got {x.dtype.name}: cast the input.")
    return x


def check_smoothing(label_smoothing) -> None:
    """Raises ValueError unless it is a share of a target."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing is a share of the target, got {label_smoothing} expected a number in "
            "[0, 1), such as 0.1."
        )
