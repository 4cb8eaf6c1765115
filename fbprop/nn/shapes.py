"""Shapes and dtypes that layers agree on: images are [B, *spatial, C], channels last."""

from __future__ import annotations

import jax.numpy as jnp


def per_dimension(value: int | tuple[int, ...], n: int, what: str) -> tuple[int, ...]:
    """One number for each of ``n`` spatial dimensions, from one for all or one each."""
    values = (value,) * n if isinstance(value, int) else tuple(value)
    if len(values) != n:
        raise ValueError(
            f"{what} has one number per spatial dimension, got {values} expected {n} of them."
        )
    return values


def check_image(name: str, x, n: int) -> None:
    """Raises unless ``x`` is a batch of images with ``n`` spatial dimensions."""
    if len(x.shape) != n + 2:
        axes = ", ".join(("B", *"DHW"[-n:], "C"))
        raise ValueError(
            f"Layer {name!r} takes a batch with channels last, got an input of shape {x.shape} "
            f"expected [{axes}]: add x[None] for one example, x[..., None] for one channel."
        )


def at_least_float32(x):
    """``x``, in float32 if it is of 16 bits: a sum of many elements needs more than 8 or 11."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
