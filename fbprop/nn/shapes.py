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
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype):
    """``dtype``, float32 if it is of 16 bits."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def check_sequence(name: str, x) -> None:
    """Raises unless ``x`` is a batch of sequences of vectors."""
    if len(x.shape) != 3:
        raise ValueError(
            f"Layer {name!r} takes a batch of sequences, got an input of shape {x.shape} expected "
            "[B, T, D]: add x[None] for one sequence, x[..., None] for one feature."
        )


def sequence_mask(lengths, steps: int):
    """Which steps of padded sequences are real, bool [B, steps]: the first ``lengths`` of each.

    It is what a loss takes as ``where``.

    Args:
      lengths: integers [B].
      steps: T, how many steps there are with padding.

    Raises:
      TypeError: lengths are not integers [B].

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> nn.sequence_mask(jnp.array([2, 0]), 3).tolist()
      [[True, True, False], [False, False, False]]
    """
    if lengths.ndim != 1 or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(
            f"lengths count the real steps of each sequence, got {lengths.dtype.name}"
            f"{list(lengths.shape)} expected integers [B]: the sum of a mask over time."
        )
    return jnp.arange(steps, dtype=lengths.dtype) < lengths[:, None]
