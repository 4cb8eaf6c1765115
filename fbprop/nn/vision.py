"""Vision transformer: images [B, H, W, C] to logits [B, classes]."""

from __future__ import annotations

import jax.numpy as jnp

from fbprop.nn import initializers
from fbprop.nn.compose import sequential
from fbprop.nn.language import transformer_block
from fbprop.nn.layer import Layer, function
from fbprop.nn.linear import conv, dense
from fbprop.nn.normalization import layer_norm
from fbprop.nn.regularization import dropout as dropout_layer
from fbprop.nn.shapes import check_image


def vit(classes: int, *, patch: int, layers: int, heads: int, features: int, dropout: float = 0.0,
        dtype=jnp.float32, name: str = "vit") -> Layer:
    """Vision transformer (Dosovitskiy et al. 2021).

    The image is cut into squares of ``patch`` pixels a side, each made a vector by one dense layer;
    a learned vector, ``class_token``, is put before them and a position's added to each; blocks of
    `attention` to all and of a dense layer to 4 · features with GELU and back, each around a
    shortcut and after a `layer_norm`, as in `gpt`; a last `layer_norm`; logits by a dense layer of
    what has become of the class token. ViT-B/16 is
    ``vit(1000, patch=16, layers=12, heads=12, features=768)``, for images of 224 pixels a side.

    Kernels are at first normal with standard deviation 0.02, as in `gpt`; class token and head's
    kernel are 0.

    Args:
      classes: outputs.
      patch: pixels of a square's side; a divisor of height and width.
      layers: blocks.
      heads: of each attention; a divisor of features.
      features: D.
      dropout: of embeddings, attention's probabilities and both branches' results, in training.
      dtype: of the parameters.

    Raises:
      ValueError: the input is not [B, H, W, C]; patch does not divide height and width; heads does
        not divide features; images of another size than the parameters are for.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.vit(10, patch=4, layers=2, heads=2, features=8)
      >>> images = jnp.ones((3, 8, 12, 1))
      >>> params = net.init(jax.random.key(0), images)
      >>> net.apply(params, images).shape, params["position_embedding"]["embedding"].shape
      ((3, 10), (7, 8))
    """
    normal = initializers.normal(0.02)
    drop = [dropout_layer(dropout)] if dropout else []
    squares = conv(features, patch, stride=patch, padding="VALID", kernel_init=normal, dtype=dtype,
                   name="patches")
    block = transformer_block(layers, heads, features, dropout, dtype, causal=False)
    return sequential(
        _whole(patch), squares, function(lambda x: x.reshape(x.shape[0], -1, features), "rows"),
        _class_token(dtype), _positions(normal, dtype), *drop, *[block] * layers,
        layer_norm(dtype=dtype), function(lambda x: x[:, 0], "first"),
        dense(classes, kernel_init=initializers.zeros, dtype=dtype, name="head"), name=name,
    )


def _whole(patch):
    """Refuses images that are not made of whole squares."""

    def whole(x):
        check_image("patches", x, 2)
        if x.shape[1] % patch or x.shape[2] % patch:
            raise ValueError(
                f"vit cuts images into squares of patch={patch} pixels a side, got images of "
                f"{x.shape[1]} x {x.shape[2]} expected multiples of {patch}: crop, pad or resize "
                "them, or choose another patch."
            )
        return x

    return function(whole)


def _class_token(dtype):
    def init(key, x):
        return {"embedding": jnp.zeros((x.shape[-1],), dtype)}

    def apply(params, x):
        token = jnp.broadcast_to(params["embedding"], (x.shape[0], 1, x.shape[-1]))
        return jnp.concatenate([token, x], 1)

    return Layer(init, apply, "class_token")


def _positions(embedding_init, dtype):
    """As `position_embedding`, of as many positions as the first images have."""

    def init(key, x):
        return {"embedding": embedding_init(key, x.shape[1:], dtype)}

    def apply(params, x):
        embedding = params["embedding"]
        if embedding.shape != x.shape[1:]:
            raise ValueError(
                f"vit's parameters are for images of one size, got {x.shape[1] - 1} squares "
                f"expected {embedding.shape[0] - 1}: resize the images, or initialise it for these."
            )
        return x + embedding

    return Layer(init, apply, "position_embedding")
