"""Rules for functions of one operand, element by element.

Each keeps whichever of operand and result gives the shorter derivative: the result, where it will
do, is usually kept by the next equation anyway.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from fbprop.rule import elementwise, linear, no_gradient

RULES = [
    elementwise("exp", "y = eˣ;  x̄ = ȳ y.  Keeps y.", lambda dy, out: dy * out),
    elementwise("exp2", "y = 2ˣ;  x̄ = ȳ y ln 2.  Keeps y.", lambda dy, out: dy * out * jnp.log(2.0).astype(out.dtype)),
    elementwise("expm1", "y = eˣ − 1;  x̄ = ȳ (y + 1).  Keeps y.", lambda dy, out: dy * (out + 1)),
    elementwise("log", "y = ln x;  x̄ = ȳ / x.  Keeps x.", lambda dy, x: dy / x),
    elementwise("log1p", "y = ln(1 + x);  x̄ = ȳ / (1 + x).  Keeps x.", lambda dy, x: dy / (1 + x)),
    elementwise("tanh", "y = tanh x;  x̄ = ȳ(1 − y²)", lambda dy, out: dy * (1 - out * out)),
    elementwise("logistic", "y = 1 / (1 + e⁻ˣ);  x̄ = ȳ y (1 − y).  Keeps y.", lambda dy, out: dy * out * (1 - out)),
    elementwise("sin", "y = sin x;  x̄ = ȳ cos x.  Keeps x.", lambda dy, x: dy * jnp.cos(x)),
    elementwise("cos", "y = cos x;  x̄ = −ȳ sin x.  Keeps x.", lambda dy, x: -dy * jnp.sin(x)),
    elementwise("sqrt", "y = √x;  x̄ = ȳ / 2y.  Keeps y.", lambda dy, out: dy / (2 * out)),
    elementwise("rsqrt", "y = 1/√x;  x̄ = −ȳ y / 2x.  Keeps x, y.", lambda dy, x, out: dy * out / (-2 * x)),
    elementwise("square", "y = x²;  x̄ = 2 ȳ x.  Keeps x.", lambda dy, x: 2 * dy * x),
    linear("convert_element_type", "y = x as another dtype;  x̄ = ȳ as x's.", lambda dy, *, x_aval: lax.convert_element_type(dy, x_aval.dtype)),
    linear("copy", "y = x;  x̄ = ȳ", lambda dy: dy),
    *no_gradient("Piecewise constant: gradient 0 where defined.", "sign", "floor", "ceil", "round"),
    *no_gradient("Blocks the gradient by definition.", "stop_gradient"),
]
