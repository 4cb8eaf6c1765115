"""Augmentation: other pictures of the same thing, drawn anew at every step.

Pure functions of a random key and a batch [B, H, W, C] that work under `jax.jit`, so they belong
into the loss function: ``loss(params, batch, key)`` has a key of its own in every step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def random_shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    """Each image moved by −pixels..pixels either way, whole pixels, zeros moving in.

    Args:
      key: random key.
      images: [B, H, W, C].
      pixels: the largest shift, >= 0.

    Returns:
      [B, H, W, C].

    Raises:
      ValueError: another form of images, or ``pixels`` < 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop.data import augment
      >>> augment.random_shift(jax.random.key(0), jnp.ones((2, 4, 4, 1)), 1).shape
      (2, 4, 4, 1)
    """
    _check_images(images)
    if not isinstance(pixels, int) or pixels < 0:
        raise ValueError(
            f"A shift is a number of whole pixels, got pixels={pixels!r} expected an integer >= 0."
        )
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    return random_crop(key, padded, images.shape[1:3])


def random_crop(key: jax.Array, images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """A window of each image, every place equally likely.

    Args:
      key: random key.
      images: [B, H, W, C].
      size: height and width of the window, at most H and W.

    Returns:
      [B, *size, C].

    Raises:
      ValueError: another form of images, or a window that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop.data import augment
      >>> augment.random_crop(jax.random.key(0), jnp.ones((2, 5, 5, 3)), (4, 3)).shape
      (2, 4, 3, 3)
    """
    _check_images(images)
    _, height, width, channels = images.shape
    if np.shape(size) != (2,):
        raise ValueError(f"A crop has two sides, got {size=} expected (height, width).")
    if not (1 <= size[0] <= height and 1 <= size[1] <= width):
        raise ValueError(
            f"A crop lies inside its image, got size={tuple(size)} expected 1 to {height} and 1 to "
            f"{width}, the images' height and width."
        )
    room = jnp.array([height - size[0] + 1, width - size[1] + 1])
    corners = jax.random.randint(key, (len(images), 2), 0, room)

    def crop(image, corner):
        start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return lax.dynamic_slice(image, start, (*size, channels))

    return jax.vmap(crop)(images, corners)


def random_flip(key: jax.Array, images: jax.Array, probability: float = 0.5) -> jax.Array:
    """Each image mirrored, left for right, with the given probability.

    Args:
      key: random key.
      images: [B, H, W, C].
      probability: in [0, 1].

    Returns:
      [B, H, W, C].

    Raises:
      ValueError: another form of images, or no probability.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop.data import augment
      >>> augment.random_flip(jax.random.key(0), jnp.arange(3.0).reshape(1, 1, 3, 1), 1.0).ravel()
      Array([2., 1., 0.], dtype=float32)
    """
    _check_images(images)
    traced = isinstance(probability, jax.core.Tracer)
    if not traced and (isinstance(probability, str) or not 0 <= probability <= 1):
        raise ValueError(
            f"Images are flipped with a probability, got {probability!r} expected one in [0, 1]."
        )
    flipped = jax.random.bernoulli(key, probability, (len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def mixup(key: jax.Array, inputs: jax.Array, targets: jax.Array, alpha: float = 0.2):
    """Mixtures of pairs of examples and of their targets (Zhang et al. 2018, arXiv:1710.09412).

    λ x + (1 − λ) x′ with λ ~ Beta(alpha, alpha), x′ another example of the batch; one λ a pair, and
    the larger of λ and 1 − λ, so that each mixture is mostly its own example.

    Args:
      key: random key.
      inputs: [B, ...], floating.
      targets: [B, ...], floating: one-hot labels, say.
      alpha: > 0; 1 mixes evenly, towards 0 hardly at all.

    Returns:
      ``(inputs, targets)`` of the same shapes and dtypes.

    Raises:
      TypeError: inputs or targets are not floating.   ValueError: alpha <= 0 or two lengths.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop.data import augment
      >>> labels = jax.nn.one_hot(jnp.array([0, 1, 2, 2]), 3)
      >>> _, mixed = augment.mixup(jax.random.key(0), jnp.ones((4, 5)), labels)
      >>> mixed.sum(axis=1).round(5).tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    for name, x in (("inputs", inputs), ("targets", targets)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"mixup adds parts of examples, got {name} of dtype {x.dtype.name} expected "
                "floating ones: jax.nn.one_hot(labels, classes) makes targets of labels."
            )
    if not alpha > 0 or len(inputs) != len(targets):
        raise ValueError(
            f"mixup pairs inputs with targets, by Beta(alpha, alpha), got {alpha=} and lengths "
            f"{len(inputs)} and {len(targets)}; expected alpha > 0 and one length."
        )
    of_order, of_share = jax.random.split(key)
    other = jax.random.permutation(of_order, len(inputs))
    share = jax.random.beta(of_share, alpha, alpha, (len(inputs),))
    share = jnp.maximum(share, 1 - share)

    def mixed(x):
        # In float32 at least: λ near 1 has no 1 − λ in 16 bits.
        wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
        part = share.astype(wide.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return (part * wide + (1 - part) * wide[other]).astype(x.dtype)

    return mixed(inputs), mixed(targets)


def _check_images(images):
    if np.ndim(images) != 4 or not hasattr(images, "dtype"):
        raise ValueError(
            f"Images are [batch, height, width, channels], got shape {np.shape(images)} expected "
            "four axes of an array: images[..., None] adds the channel to grey ones."
        )
