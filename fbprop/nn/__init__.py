"""Networks as pairs of pure functions over parameter pytrees; losses.

>>> import jax, jax.numpy as jnp
>>> from fbprop import nn
>>> net = nn.sequential(nn.conv(8), nn.relu(), nn.max_pool(), nn.flatten(), nn.dense(10))
>>> params = net.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
>>> net.apply(params, jnp.ones((5, 8, 8, 1))).shape
(5, 10)

Layers are plain `jax.numpy`, `jax.nn` and `jax.lax`: fbprop's rules see through them, and so does
`jax.grad`. Images are [B, H, W, C], sequences [B, T, D]. What else there is goes through
`Layer.apply` of the whole network to the layers that need it: ``key`` for random numbers,
``train``, ``lengths`` of padded sequences, ``state`` for running statistics, which comes back
updated::

    params, state = net.init(key, x), net.init_state(x)
    logits, state = net.apply(params, x, state=state, key=key, train=True)
"""

from fbprop.nn import initializers
from fbprop.nn.activations import elu, gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh
from fbprop.nn.attention import attention, position_embedding
from fbprop.nn.audio import log_mel, mel_filters
from fbprop.nn.autoencoders import autoencoder, normal_divergence, vae
from fbprop.nn.compose import repeated, residual, sequential
from fbprop.nn.encoder import encoder
from fbprop.nn.language import gpt, gru_lm, lstm_lm, next_token_loss
from fbprop.nn.layer import Layer, function
from fbprop.nn.linear import conv, dense, embedding
from fbprop.nn.losses import accuracy, mean_squared_error, softmax_cross_entropy
from fbprop.nn.networks import convnet, mlp, resnet
from fbprop.nn.normalization import batch_norm, group_norm, layer_norm, rms_norm
from fbprop.nn.parameters import combine, count_parameters, partition
from fbprop.nn.pooling import avg_pool, flatten, global_avg_pool, max_pool
from fbprop.nn.pretrained import load_bert, load_gpt2
from fbprop.nn.recurrent import bidirectional, gru, lstm
from fbprop.nn.regularization import dropout
from fbprop.nn.shapes import sequence_mask
from fbprop.nn.spiking import leaky_integrate_and_fire
from fbprop.nn.summary import summary
from fbprop.nn.vision import vit

__all__ = [
    "Layer", "accuracy", "attention", "autoencoder", "avg_pool", "batch_norm", "bidirectional",
    "combine", "conv", "convnet", "count_parameters", "dense", "dropout", "elu", "embedding",
    "encoder", "flatten", "function", "gelu", "global_avg_pool", "gpt", "group_norm", "gru",
    "gru_lm", "initializers", "layer_norm", "leaky_integrate_and_fire", "leaky_relu", "load_bert",
    "load_gpt2", "log_mel", "lstm", "lstm_lm", "max_pool", "mean_squared_error", "mel_filters",
    "mlp", "next_token_loss", "normal_divergence", "partition", "position_embedding", "relu",
    "repeated", "residual", "resnet", "rms_norm", "sequence_mask", "sequential", "sigmoid", "silu",
    "softmax_cross_entropy", "softplus", "summary", "tanh", "vae", "vit",
]
