"""Layers that multiply by a kernel, or look up its rows: dense, conv, embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.nn import initializers
from fbprop.nn.layer import Layer
from fbprop.nn.shapes import (
    check_dtype,
    check_fits,
    check_image,
    check_width,
    no_wrap,
    parameter,
    per_dimension,
)


def dense(features: int, *, bias: bool = True, kernel_init=initializers.lecun_normal(),
          bias_init=initializers.zeros, dtype=jnp.float32, name: str = "dense") -> Layer:
    """y = x W + b over the last dimension.

    Parameters: ``kernel`` [in, features], ``bias`` [features].

    Args:
      features: size of the last dimension of y.
      bias: whether there is one.
      kernel_init, bias_init: see `fbprop.nn.initializers`.
      dtype: of the parameters; y's dtype follows from x and it.

    Raises:
      ValueError: the input is a scalar; it is of another width than at `init`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> init, apply = nn.dense(5)
      >>> x = jnp.ones((2, 3))
      >>> apply(init(jax.random.key(0), x), x).shape
      (2, 5)
    """

    def init(key, x):
        if not x.shape:
            raise ValueError(
                f"Layer {name!r} multiplies the last dimension, got an input of shape () expected "
                "at least one dimension."
            )
        shape = (x.shape[-1], features)
        return _kernel_and_bias(key, shape, bias, kernel_init, bias_init, dtype)

    def apply(params, x, **_):
        kernel = parameter(name, params, "kernel")
        check_width(name, x, kernel.shape[0])
        return _add_bias(params, x @ kernel)

    return Layer(init, apply, name)


def conv(features: int, kernel_size: int | tuple[int, ...] = 3, *, stride=1, padding="SAME",
         dilation=1, groups: int = 1, bias: bool = True,
         kernel_init=initializers.lecun_normal(), bias_init=initializers.zeros,
         dtype=jnp.float32, name: str = "conv") -> Layer:
    """Convolution (cross-correlation, as in all of deep learning) of [B, *spatial, C].

    Parameters: ``kernel`` [*kernel_size, C / groups, features], ``bias`` [features]. With ``SAME``
    padding and stride s a side of n pixels becomes ceil(n / s).

    Args:
      features: channels of the output.
      kernel_size: an int k for k x k images; a tuple of 1, 2 or 3 for that many dimensions.
      stride, dilation: an int for all dimensions, or one each. Dilation spreads the kernel.
      padding: ``"SAME"``, ``"VALID"``, ``"SAME_LOWER"``, or ((low, high), ...) per dimension.
      groups: channels are convolved in that many separate groups; C of them is depthwise.
      bias, kernel_init, bias_init, dtype: as for `dense`.

    Raises:
      ValueError: the input is not [B, *spatial, C], of as many channels as at `init`; groups does
        not divide C and features; a tuple has the wrong length; the kernel is larger than the
        image and nothing is padded.   TypeError: the input's dtype is not the kernel's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> init, apply = nn.conv(5, 3, stride=2)
      >>> x = jnp.ones((2, 7, 7, 3))
      >>> apply(init(jax.random.key(0), x), x).shape
      (2, 4, 4, 5)
    """
    window = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
    n = len(window)
    spatial = "DHW"[-n:]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    strides = per_dimension(stride, n, "conv's stride")
    dilations = per_dimension(dilation, n, "conv's dilation")

    def init(key, x):
        check_image(name, x, n)
        if x.shape[-1] % groups or features % groups:
            raise ValueError(
                f"Layer {name!r} splits channels into equal groups, got groups={groups} expected a "
                f"divisor of {x.shape[-1]} input channels and of features={features}."
            )
        shape = (*window, x.shape[-1] // groups, features)
        return _kernel_and_bias(key, shape, bias, kernel_init, bias_init, dtype)

    def apply(params, x, **_):
        check_image(name, x, n)
        kernel = parameter(name, params, "kernel")
        check_width(name, x, kernel.shape[-2] * groups)
        check_dtype(name, x, kernel)
        y = lax.conv_general_dilated(
            x, kernel, strides, padding, rhs_dilation=dilations,
            dimension_numbers=layout, feature_group_count=groups,
        )
        check_fits(name, x, y, window)
        return _add_bias(params, y)

    return Layer(init, apply, name)


def embedding(num_embeddings: int, features: int, *, embedding_init=initializers.normal(0.02),
              dtype=jnp.float32, name: str = "embedding") -> Layer:
    """A learned vector for each integer: y[...] = embedding[x[...]].

    Parameters: ``embedding`` [num_embeddings, features], at first normal with standard deviation
    0.02 (as GPT-2's).

    Args:
      num_embeddings: integers 0..num_embeddings−1 have a vector; others, negative ones too, give
        NaN, not another integer's vector.
      features: length of a vector.
      embedding_init: see `fbprop.nn.initializers`.
      dtype: of the parameters, and of y.

    Raises:
      TypeError: the input is not of integer dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> init, apply = nn.embedding(7, 3)
      >>> tokens = jnp.array([[0, 6, 2, 2, 1]])
      >>> apply(init(jax.random.key(0), tokens), tokens).shape
      (1, 5, 3)
    """

    def init(key, x):
        return {
            "embedding": initializers.made(embedding_init, key, (num_embeddings, features), dtype)
        }

    def apply(params, x, **_):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(
                f"Layer {name!r} looks up integers, got an input of dtype {x.dtype.name} expected "
                "int32: convert with x.astype(jnp.int32)."
            )
        vectors = parameter(name, params, "embedding")
        return jnp.take(vectors, no_wrap(x, vectors.shape[0]), axis=0)

    return Layer(init, apply, name)


def _kernel_and_bias(key, shape, bias, kernel_init, bias_init, dtype):
    kernel_key, bias_key = jax.random.split(key)
    params = {"kernel": initializers.made(kernel_init, kernel_key, shape, dtype)}
    if bias:
        params["bias"] = bias_init(bias_key, shape[-1:], dtype)
    return params


def _add_bias(params, y):
    return y + params["bias"] if "bias" in params else y
