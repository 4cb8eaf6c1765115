"""Derivatives for what has none: steps, signs, rounding, the largest of several.

A surrogate is a rule for `fbprop.Table.override`, so the choice is made by path and the model stays
as it is; `step` has its own built in, for code that is to learn under any differentiation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fbprop.core.rule import Rule, rule

# Of the distance x to where it jumps; usual slope s; formula and source.
SHAPES = {
    "fast_sigmoid": (lambda x, s: 1 / jnp.square(1 + s * jnp.abs(x)), 25.0),
    "arctan": (lambda x, s: s / 2 / (1 + jnp.square(jnp.pi / 2 * s * x)), 2.0),
    "triangle": (lambda x, s: jnp.maximum(1 - s * jnp.abs(x), 0), 1.0),
    "clipped": (lambda x, s: (s * jnp.abs(x) <= 1).astype(x.dtype), 1.0),
    "straight_through": (lambda x, s: jnp.ones_like(x), 1.0),
}
# The functions: name of the rule, distance to the nearest jump, its height, operands besides x.
FUNCTIONS = {
    "step": ("jax.numpy.heaviside", lambda x: x, 1, {"x2": None}),
    "sign": ("sign", lambda x: x, 2, {}),
    "round": ("round", lambda x: x - jnp.floor(x) - 0.5, 1, {}),
    "floor": ("floor", lambda x: x - jnp.round(x), 1, {}),
    "ceil": ("ceil", lambda x: x - jnp.round(x), 1, {}),
}


def surrogate(function: str, shape: str = "fast_sigmoid", slope: float | None = None) -> Rule:
    """A derivative for a function that jumps: ȳ h(x), x the distance to the nearest jump.

    | shape | h(x), of slope s | s, if not given | source |
    |---|---|---|---|
    | "fast_sigmoid" | 1 / (1 + s ∣x∣)² | 25 | Zenke and Ganguli 2018 |
    | "arctan" | (s / 2) / (1 + (π s x / 2)²) | 2 | Fang et al. 2021 |
    | "triangle" | max(1 − s ∣x∣, 0) | 1 | Esser et al. 2016; Bellec et al. 2018 |
    | "clipped" | 1 where s ∣x∣ <= 1 | 1 | Hubara et al. 2016 |
    | "straight_through" | 1 | | Bengio et al. 2013 |

    Kept is x. Where the jump is of 2, as of sign, h is doubled, but for the last two, which stand
    for the function's trend. "argmax" is `one_hot_argmax`; its derivative is that of softmax(s x),
    s = 1 if not given, whatever the shape.

    Args:
      function: "step" (`jax.numpy.heaviside`), "sign", "round", "floor", "ceil" or "argmax".
      shape, slope: see above.

    Returns:
      A rule for ``fbprop.table.override(rule, where="encoder/*")``.

    Raises:
      ValueError: another function or shape, or a slope that is not positive.

    Example: a weight in eight levels, trained through the rounding.
      >>> import fbprop, jax.numpy as jnp
      >>> from fbprop import learning
      >>> def loss(w, x, y):
      ...     quantised = jnp.round(w * 4) / 4
      ...     return jnp.mean((x @ quantised - y) ** 2)
      >>> rules = fbprop.table.override(learning.surrogate("round", "straight_through"))
      >>> w, x = jnp.zeros(2), jnp.eye(2)
      >>> for _ in range(40):
      ...     w = w - 0.1 * fbprop.grad(loss, rules=rules)(w, x, jnp.array([0.75, -0.5]))
      >>> (jnp.round(w * 4) / 4).tolist()
      [0.75, -0.5]
    """
    shape_of, s = _shape(shape, slope)
    if function == "argmax":
        return _of_argmax(1.0 if slope is None else slope)
    if function not in FUNCTIONS:
        raise ValueError(
            "A surrogate is for a function that jumps, got "
            f"{function!r} expected one of {[*FUNCTIONS, 'argmax']}."
        )
    name, distance, height, others = FUNCTIONS[function]
    height = height if shape in ("fast_sigmoid", "arctan", "triangle") else 1

    def pullback(dy, x):
        return dy * jnp.asarray(height, x.dtype) * shape_of(distance(x), jnp.asarray(s, x.dtype))

    if others:
        pulled = {"x1": lambda dy, x1: pullback(dy, x1), **others}
    else:
        pulled = {"x": pullback}
    return rule(name, f"y = {function} x;  x̄ = ȳ h(x), {shape} of slope {s}.  Keeps x.", **pulled)


def _of_argmax(s):
    def pullback(dy, x, *, axis=-1):
        scale = jnp.asarray(s, x.dtype)
        p = jax.nn.softmax(scale * x, axis=axis)
        return scale * p * (dy - jnp.sum(dy * p, axis=axis, keepdims=True))

    return rule(
        "fbprop.learning.one_hot_argmax", "y = onehot argmax x;  x̄ = s p (ȳ − Σ ȳ p), p = "
        f"softmax(s x), s = {s}.  Keeps x.", x=pullback,
    )


@functools.partial(jax.jit, static_argnames="axis")
def one_hot_argmax(x, axis: int = -1):
    """1 where x is the largest along an axis, the first of equal ones, else 0; derivative 0.

    `surrogate` gives it another.

    Args:
      x: floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import learning
      >>> learning.one_hot_argmax(jnp.array([1.0, 3.0, 2.0])).tolist()
      [0.0, 1.0, 0.0]
    """
    return jax.nn.one_hot(jnp.argmax(x, axis=axis), x.shape[axis], axis=axis, dtype=x.dtype)


def step(x, shape: str = "fast_sigmoid", slope: float | None = None):
    """1 where x > 0, else 0, with a surrogate for its derivative: ẏ = h(x) ẋ, under JAX as well.

    Args:
      x: floating.
      shape, slope: h, see `surrogate`.

    Raises:
      ValueError: another shape, or a slope that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> float(learning.step(jnp.float32(1))), float(jax.grad(learning.step)(0.0))
      (1.0, 1.0)
    """
    return _step(*_shape(shape, slope))(jnp.asarray(x))


@functools.lru_cache(64)
def _step(shape_of: Callable, s: float) -> Callable:
    @jax.custom_jvp
    def step(x):
        return (x > 0).astype(x.dtype)

    @step.defjvp
    def tangent(primals, tangents):
        (x,), (dot,) = primals, tangents
        return step(x), dot * shape_of(x, jnp.asarray(s, x.dtype))

    return step


def _shape(shape, slope):
    if shape not in SHAPES:
        raise ValueError(
            f"A surrogate has a shape, got {shape!r} expected one of {[*SHAPES]}."
        )
    shape_of, usual = SHAPES[shape]
    if slope is not None and not slope > 0:
        raise ValueError(f"A surrogate's slope is positive, got slope={slope}: {usual} is usual.")
    return shape_of, usual if slope is None else float(slope)
