"""Network operations whose backward pass was derived by hand: pure functions for any JAX program.

Each is a primitive with a rule of its own, so it is cheap under `fbprop.grad` and under `jax.grad`
alike, and forward mode, second order and `jax.vmap` work (`fbprop.core.operation`).
"""

from fbprop.ops.activation import dense, geglu, gelu, silu, swiglu
from fbprop.ops.attention import attention
from fbprop.ops.ctc import ctc_loss
from fbprop.ops.dropout import dropout
from fbprop.ops.linear_cross_entropy import linear_cross_entropy
from fbprop.ops.losses import huber, sigmoid_cross_entropy, softmax_cross_entropy
from fbprop.ops.normalization import batch_norm, group_norm, layer_norm, rms_norm
from fbprop.ops.recurrent import gru, lstm, rnn
from fbprop.ops.rotary import rotary

__all__ = [
    "attention", "batch_norm", "ctc_loss", "dense", "dropout", "geglu", "gelu", "group_norm", "gru",
    "huber", "layer_norm", "linear_cross_entropy", "lstm", "rms_norm", "rnn", "rotary",
    "sigmoid_cross_entropy", "silu", "softmax_cross_entropy", "swiglu",
]
