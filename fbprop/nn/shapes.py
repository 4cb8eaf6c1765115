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


def check_width(name: str, x, width: int) -> None:
    """Raises unless the last dimension of ``x`` is what a layer's parameters are for."""
    if x.shape[-1:] != (width,):
        raise ValueError(
            f"Layer {name!r} has parameters for inputs of one width, got an input of shape "
            f"{x.shape} expected [..., {width}]: initialise it for this input, or mend the layer "
            "before it."
        )


def check_dtype(name: str, x, kernel) -> None:
    """Raises unless an input and a kernel are of one dtype, as a convolution takes them."""
    if x.dtype != kernel.dtype:
        raise TypeError(
            f"Layer {name!r} multiplies numbers of one dtype, got an input of dtype "
            f"{x.dtype.name} expected {kernel.dtype.name} as its kernel: convert with "
            f"x.astype(jnp.{kernel.dtype.name}), uint8 images / 255."
        )


def check_fits(name: str, x, y, window) -> None:
    """Raises if ``window`` is larger than the images ``x``, so that of them nothing is left."""
    if 0 in y.shape[1:-1] and 0 not in x.shape[1:-1]:
        raise ValueError(
            f"Layer {name!r} moves a window within the image, got a window of {tuple(window)} "
            f"expected at most {x.shape[1:-1]} for an input of shape {x.shape}, channels last: "
            "transpose [B, C, H, W], use larger images, fewer stages or a smaller window."
        )


def parameter(name: str, params, key: str):
    """``params[key]``, or what is wrong with ``params``."""
    try:
        return params[key]
    except (KeyError, IndexError, TypeError):
        got = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ValueError(
            f"Layer {name!r} is applied to its own parameters, got {got} expected a dict with "
            f"{key!r}: pass what its init returned."
        ) from None


def counted(where, x, name: str = "where"):
    """``x`` with zeros where it does not count: there it may hold anything, nan too."""
    if where is None:
        return x
    shape, dtype = jnp.shape(x), jnp.result_type(where)
    if not (jnp.issubdtype(dtype, jnp.bool_) and _broadcasts(jnp.shape(where), shape)):
        raise ValueError(
            f"{name} says of each element whether it counts, got {dtype.name}"
            f"{list(jnp.shape(where))} expected booleans that broadcast to {list(shape)}."
        )
    return jnp.where(where, x, jnp.zeros((), x.dtype))


def _broadcasts(shape, to):
    pairs = zip(reversed(shape), reversed(to))
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)


def mean(x, where=None):
    """Mean of what counts; 0 if nothing does."""
    if where is None:
        return jnp.mean(x)
    number = jnp.sum(jnp.broadcast_to(where, x.shape), dtype=jnp.int32)
    return jnp.sum(counted(where, x)) / jnp.maximum(number, 1).astype(x.dtype)


def no_wrap(indices, n: int):
    """Integers as indices into ``n`` things: negative ones are out of range, not from the end."""
    if jnp.iinfo(indices.dtype).max < n:
        indices = indices.astype(jnp.int32)  # the first that is out of range has to fit
    return jnp.where(indices < 0, jnp.asarray(n, indices.dtype), indices)


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


def without_padding(x, lengths):
    """Padded sequences [B, T, ...] with zeros for padding: there it may hold anything, nan too."""
    if jnp.ndim(x) < 2:
        return x  # whoever takes sequences says so
    real = sequence_mask(lengths, x.shape[1])
    if real.shape[0] != x.shape[0]:
        raise ValueError(
            f"lengths has one number per sequence, got {real.shape[0]} of them expected "
            f"{x.shape[0]} for an input of shape {x.shape}."
        )
    return counted(real.reshape(real.shape + (1,) * (x.ndim - 2)), x)
