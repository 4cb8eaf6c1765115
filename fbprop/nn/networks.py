"""Ready networks for vectors and images: mlp, convnet, resnet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from fbprop.nn import initializers
from fbprop.nn.activations import relu
from fbprop.nn.compose import residual, sequential
from fbprop.nn.layer import Layer
from fbprop.nn.linear import conv, dense
from fbprop.nn.normalization import batch_norm
from fbprop.nn.pooling import flatten, global_avg_pool, max_pool
from fbprop.nn.regularization import dropout as dropout_layer


def mlp(*sizes: int, activation: Callable[[], Layer] = relu, dropout: float = 0.0,
        dtype=jnp.float32, name: str = "mlp") -> Layer:
    """Dense layers with an activation between each two (multilayer perceptron).

    Inputs of more dimensions than [B, D] are flattened. Hidden kernels are `he_normal`.

    Args:
      *sizes: features of each layer's output; the last is the network's.
      activation: makes the layer in between: `relu`, `gelu`, ...
      dropout: after each activation, in training.
      dtype: of the parameters.

    Raises:
      ValueError: no sizes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.mlp(300, 100, 10)
      >>> x = jnp.ones((2, 8, 8, 1))
      >>> params = net.init(jax.random.key(0), x)
      >>> net.apply(params, x).shape, nn.count_parameters(params)
      ((2, 10), 50610)
    """
    if not sizes:
        raise ValueError(
            "mlp is made of dense layers, got no sizes expected at least one: nn.mlp(300, 10)."
        )
    hidden = []
    for size in sizes[:-1]:
        hidden.append(dense(size, kernel_init=initializers.he_normal(), dtype=dtype))
        hidden.append(activation())
        hidden += _dropout(dropout)
    return sequential(flatten(), *hidden, dense(sizes[-1], dtype=dtype), name=name)


def convnet(classes: int, *, channels: Sequence[int] = (32, 64), convolutions: int = 2,
            norm: Callable[..., Layer] | None = None, dropout: float = 0.0, dtype=jnp.float32,
            name: str = "convnet") -> Layer:
    """Stages of 3 x 3 convolutions with ReLU, each stage ended by 2 x 2 max pooling; then dense.

    In the manner of VGG (Simonyan & Zisserman 2015). Images [B, H, W, C], of at least
    2^(number of stages) pixels a side, become logits [B, classes]. Kernels are `he_normal`.

    Args:
      classes: outputs.
      channels: of each stage.
      convolutions: in each stage.
      norm: makes what stands between convolution and ReLU, `batch_norm` (the network then has
        state), `group_norm`, ...; None: nothing.
      dropout: before the dense layer, in training.
      dtype: of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.convnet(10, channels=(8, 16))
      >>> net.out_shape(jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.float32)).shape
      (5, 10)
    """
    layers = []
    for features in channels:
        for _ in range(convolutions):
            layers.append(_conv3(features, dtype, bias=norm is None))
            layers += [] if norm is None else [norm(dtype=dtype)]
            layers.append(relu())
        layers.append(max_pool(2))
    head = dense(classes, dtype=dtype, name="head")
    return sequential(*layers, flatten(), *_dropout(dropout), head, name=name)


def resnet(classes: int, *, depth: int = 20, width: int = 16, momentum: float = 0.9,
           axis_name=None, dtype=jnp.float32, name: str = "resnet") -> Layer:
    """Residual network for small images (He et al. 2016, section 4.2) with batch norm.

    A convolution; three stages of n residual blocks of two 3 x 3 convolutions each, with width,
    2 · width and 4 · width channels, the second and third stage halving the sides; the mean over
    positions; a dense layer. 6 n + 2 layers with weights: depth 20 has 0.27 million parameters at
    width 16. Where a block changes the shape, its shortcut is a 1 x 1 convolution with batch norm
    (the paper's option B; its option A, cropping and zeros, was made for counting parameters).

    The network has state: ``net.init_state(x)``, ``net.apply(params, x, state=state, ...)``.

    Args:
      classes: outputs; images [B, H, W, C] become logits [B, classes].
      depth: 6 n + 2: 8, 14, 20, 32, 44, 56, ...
      width: channels of the first stage.
      momentum, axis_name: as for `batch_norm`.
      dtype: of the parameters.

    Raises:
      ValueError: depth is not 6 n + 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net, x = nn.resnet(10, depth=8, width=2), jnp.ones((3, 8, 8, 1))
      >>> params, state = net.init(jax.random.key(0), x), net.init_state(x)
      >>> logits, state = net.apply(params, x, state=state, train=True)
      >>> logits.shape
      (3, 10)
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(
            f"resnet has three stages of equally many blocks of two layers, got depth={depth} "
            "expected 6 n + 2: 8, 14, 20, 32, 44, 56."
        )

    def norm():
        return batch_norm(momentum=momentum, axis_name=axis_name, dtype=dtype)

    def block(features, stride):
        branch = (_conv3(features, dtype, stride=stride, bias=False), norm(), relu(),
                  _conv3(features, dtype, bias=False), norm())
        return residual(*branch, shortcut=shortcut(features, stride), name="block")

    def shortcut(features, stride):
        if stride == 1:
            return None
        kernel_init = initializers.he_normal()
        return sequential(
            conv(features, 1, stride=stride, bias=False, kernel_init=kernel_init, dtype=dtype),
            norm(),
        )

    layers = [_conv3(width, dtype, bias=False), norm(), relu()]
    for stage in range(3):
        for i in range(blocks):
            layers += [block(width * 2**stage, 2 if stage and not i else 1), relu()]
    head = dense(classes, dtype=dtype, name="head")
    return sequential(*layers, global_avg_pool(), head, name=name)


def _conv3(features, dtype, **options):
    return conv(features, 3, kernel_init=initializers.he_normal(), dtype=dtype, **options)


def _dropout(rate):
    return [dropout_layer(rate)] if rate else []
