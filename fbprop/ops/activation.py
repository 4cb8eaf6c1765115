"""Activations, gated activations and a dense layer with its activation, keeping the least."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core.devices import own_broadcasting
from fbprop.core.opaque import held
from fbprop.core.operation import Operation
from fbprop.core.precision import wide_dtype
from fbprop.ops.arguments import floating
from fbprop.rules import register
from fbprop.rules.library_functions import gelu_pullback, silu_pullback

# Function, and x̄ from ȳ and x. What these keep is x, from which all is made again.
ACTIVATIONS = {
    "gelu": (functools.partial(jax.nn.gelu, approximate=False),
             functools.partial(gelu_pullback, approximate=False)),
    "gelu_tanh": (jax.nn.gelu, functools.partial(gelu_pullback, approximate=True)),
    "silu": (jax.nn.silu, silu_pullback),
    "relu": (jax.nn.relu, lambda dy, x: jnp.where(x > 0, dy, 0)),
    "tanh": (jnp.tanh, lambda dy, x: dy * (1 - jnp.square(jnp.tanh(x)))),
    "sigmoid": (jax.nn.sigmoid, lambda dy, x: dy * lax.logistic(x) * lax.logistic(-x)),
}


def gelu(x, *, approximate: bool = True):
    """x Φ(x), Φ the normal distribution function, or its form by tanh (Hendrycks & Gimpel 2016).

    | kept | shape | instead of |
    |---|---|---|
    | x | as x | x and Φ or tanh |

    x̄ = ȳ (Φ + x Φ'), also where x² overflows. At −inf y is nan, as of `jax.nn.gelu`, and x̄ = 0.

    Args:
      x: floating.
      approximate: the form by tanh, as in GPT-2.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.gelu(jnp.array([0.0, 100.0])).tolist()
      [0.0, 100.0]
    """
    return _activate(floating("gelu", x), name="gelu_tanh" if approximate else "gelu")


def silu(x):
    """x σ(x), also called swish (Elfwing et al. 2018); kept is x.  x̄ = ȳ (σ + x σ (1 − σ)).

    At −inf y is nan, as of `jax.nn.silu`, and x̄ = 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.silu(jnp.array([0.0, 100.0])).tolist()
      [0.0, 100.0]
    """
    return _activate(floating("silu", x), name="silu")


def swiglu(gate, x):
    """silu(gate) · x (Shazeer 2020), of arrays of one shape.

    | kept | shape | instead of |
    |---|---|---|
    | gate, x | as given | gate, x, σ(gate), silu(gate) |

    Raises:
      ValueError: gate and x differ in shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.swiglu(jnp.array([100.0]), jnp.array([3.0])).tolist()
      [300.0]
    """
    return _gate(*_pair("swiglu", gate, x), name="silu")


def geglu(gate, x, *, approximate: bool = True):
    """gelu(gate) · x (Shazeer 2020), of arrays of one shape; kept are gate and x.

    Args:
      gate, x: of one shape and floating dtype.
      approximate: as for `gelu`.

    Raises:
      ValueError: gate and x differ in shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.geglu(jnp.array([100.0]), jnp.array([3.0])).tolist()
      [300.0]
    """
    return _gate(*_pair("geglu", gate, x), name="gelu_tanh" if approximate else "gelu")


def dense(x, w, bias=None, *, activation: str | None = None):
    """activation(x w + bias).

    | kept | shape | instead of |
    |---|---|---|
    | x, w; z = x w + bias, if f' asks for it | [..., D], [D, E]; [..., E] | also what f keeps |

    z̄ = ȳ f'(z), x̄ = z̄ wᵀ, w̄ = xᵀ z̄, bias̄ = Σ z̄. Products of 16-bit numbers add up in float32, and
    bias and activation are applied before the result is rounded.

    Args:
      x: [..., D], floating.
      w: [D, E], of x's dtype.
      bias: [E], or None.
      activation: "gelu" (x Φ(x) itself), "gelu_tanh", "silu", "relu", "tanh", "sigmoid", or None.

    Returns:
      [..., E], of x's dtype.

    Raises:
      ValueError: another activation; shapes or dtypes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.dense(jnp.ones((2, 3)), jnp.ones((3, 1)), activation="relu").tolist()
      [[3.0], [3.0]]
    """
    x, w = floating("dense", x), jnp.asarray(w)
    if activation not in (None, *ACTIVATIONS):
        names = ", ".join(map(repr, (*ACTIVATIONS, None)))
        raise ValueError(f"dense's activation is one of {names}, got {activation!r}.")
    if w.ndim != 2 or x.shape[-1:] != w.shape[:1] or w.dtype != x.dtype:
        raise ValueError(
            "dense multiplies x [..., D] by w [D, E] of the same dtype, got "
            f"{x.dtype.name}{list(x.shape)} and {w.dtype.name}{list(w.shape)}."
        )
    if bias is not None and jnp.shape(bias) != w.shape[1:]:
        raise ValueError(f"dense's bias has shape {jnp.shape(bias)}, expected {w.shape[1:]}.")
    if activation is None:  # a product keeps its factors only, as it stands
        return _before(x, w, bias).astype(x.dtype)
    return _dense(x, w, bias, name=activation)


def _pair(name, gate, x):
    gate, x = floating(name, gate), floating(name, x)
    if gate.shape != x.shape or gate.dtype != x.dtype:
        raise ValueError(
            f"{name} multiplies arrays of one shape and dtype, got {gate.dtype.name}"
            f"{list(gate.shape)} and {x.dtype.name}{list(x.shape)}."
        )
    return gate, x


_activate = Operation(
    "activation", "y = f(x);  x̄ = ȳ f'(x).  Keeps x.",
    lambda x, *, name: ACTIVATIONS[name][0](x),
    lambda x, *, name: ACTIVATIONS[name][0](x),
    lambda dy, x, *, name: ACTIVATIONS[name][1](dy, x),
)


def _gated(gate, x, *, name):
    return ACTIVATIONS[name][0](gate) * x


def _gated_backward(dy, gate, x, *, name):
    function, pullback = ACTIVATIONS[name]
    gate = held(gate, dy)  # else XLA keeps f(gate)
    return pullback(dy * x, gate), dy * function(gate)


_gate = Operation(
    "gated_activation", "y = f(a) b;  ā = ȳ b f'(a), b̄ = ȳ f(a).  Keeps a and b.",
    _gated, _gated, _gated_backward,
)


def _before(x, w, bias):
    z = jnp.matmul(x, w, preferred_element_type=wide_dtype(x.dtype))
    if bias is None:
        return z
    with own_broadcasting():
        return z + jnp.asarray(bias).astype(z.dtype)


def _dense_reference(x, w, bias, *, name):
    return ACTIVATIONS[name][0](_before(x, w, bias)).astype(x.dtype)


def _dense_forward(x, w, bias, *, name):
    z = _before(x, w, bias)
    return ACTIVATIONS[name][0](z).astype(x.dtype), z.astype(x.dtype)


def _dense_backward(dy, x, w, z, *, name):
    dz = ACTIVATIONS[name][1](dy, z)
    over, kind = tuple(range(x.ndim - 1)), wide_dtype(dy.dtype)
    dx = jnp.matmul(dz, w.T, preferred_element_type=kind)
    dw = lax.dot_general(x, dz, ((over, over), ((), ())), preferred_element_type=kind)
    return dx, dw, jnp.sum(dz, over, dtype=kind)


_dense = Operation(
    "dense", "y = f(z), z = x w + b;  z̄ = ȳ f'(z), x̄ = z̄ wᵀ, w̄ = xᵀ z̄, b̄ = Σ z̄.  Keeps x, w, z.",
    _dense_reference, _dense_forward, _dense_backward, extras=("z",), weighs=True,
)
register(*_activate.rules, *_gate.rules, *_dense.rules)
