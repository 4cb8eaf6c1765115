"""Networks as pairs of pure functions over parameter pytrees; losses.

>>> import jax, jax.numpy as jnp
>>> from fbprop import nn
>>> net = nn.sequential(nn.conv(8), nn.relu(), nn.max_pool(), nn.flatten(), nn.dense(10))
>>> params = net.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
>>> net.apply(params, jnp.ones((5, 8, 8, 1))).shape
(5, 10)

Layers are plain `jax.numpy`, `jax.nn` and `jax.lax`: fbprop's rules see through them, and so does
`jax.grad`. Images are [B, H, W, C]. Layers that draw random numbers take an explicit key.
"""

from fbprop.nn import initializers
from fbprop.nn.activations import elu, gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh
from fbprop.nn.layer import Layer, function, sequential
from fbprop.nn.linear import conv, dense, embedding
from fbprop.nn.losses import accuracy, mean_squared_error, softmax_cross_entropy
from fbprop.nn.normalization import layer_norm
from fbprop.nn.pooling import avg_pool, flatten, max_pool
from fbprop.nn.regularization import dropout

__all__ = [
    "Layer", "accuracy", "avg_pool", "conv", "dense", "dropout", "elu", "embedding", "flatten",
    "function", "gelu", "initializers", "layer_norm", "leaky_relu", "max_pool",
    "mean_squared_error", "relu", "sequential", "sigmoid", "silu", "softmax_cross_entropy",
    "softplus", "tanh",
]
