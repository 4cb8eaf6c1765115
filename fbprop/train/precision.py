"""Mixed precision: 16-bit arithmetic around float32 parameters, with a loss scale for float16.

Micikevicius et al. 2018, "Mixed precision training", arXiv:1710.03740.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.optim.arguments import check_count, passes

# A scale of 2⁶⁴ lifts gradients of 3e-27 into float16, and times or divided by any sensible weight
# it stays a normal float32; doubled for ever it would be infinite after 113 intervals.
LARGEST = 2.0**64


class LossScale(NamedTuple):
    """The factor by which a float16 loss is multiplied, and what decides about its next value.

    Attributes:
      scale: float32 []; gradients below 6e-8, which float16 rounds to 0, survive times this.
      good_steps: int32 [], steps since the last change.
      interval: int32 [], steps without overflow after which the scale is doubled.
    """

    scale: jax.Array
    good_steps: jax.Array
    interval: jax.Array


def loss_scale(initial: float = 2.0**15, interval: int = 2000) -> LossScale:
    """A dynamic loss scale, for ``train.init(..., loss_scale=train.loss_scale())``.

    A step whose gradients are not all finite changes nothing but the scale, which is halved (down
    to 1); after ``interval`` steps without, it is doubled (up to 2⁶⁴). The rule is that of
    PyTorch's ``GradScaler``, which begins with 2¹⁶ and stops short of infinity.

    Args:
      initial: the first scale, a power of two, so that scaling does not round.
      interval: see above.

    Raises:
      ValueError: ``initial`` is no power of two from 1 to 2⁶⁴, or ``interval`` is no integer from 1
        to 2³¹ − 1.

    Example:
      >>> from fbprop import train
      >>> float(train.loss_scale().scale)
      32768.0
    """
    if not passes("initial", initial, lambda v: 1 <= v <= LARGEST and math.frexp(v)[0] == 0.5):
        raise ValueError(
            f"A loss scale is a power of two, got initial={initial} expected 1, 2, 4, ... up to "
            "2**64: with others every gradient would be rounded twice."
        )
    check_count("interval", interval)
    if interval > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"Steps are int32, got interval={interval} expected at most 2**31 - 1.")
    return LossScale(jnp.float32(initial), jnp.int32(0), jnp.int32(interval))


def cast(tree: Any, dtype) -> Any:
    """The floating arrays of a pytree in ``dtype``, the others as they are; None: no change."""
    if dtype is None:
        return tree

    def one(x):
        floating = jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
        return jnp.asarray(x).astype(dtype) if floating else x

    return tree_map(one, tree)


def all_finite(tree) -> jax.Array:
    """Whether every element of every inexact array is finite, bool []."""
    inexact = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in inexact] or [True]))


def keep_if_finite(finite: jax.Array, new, old):
    """The state after a step, with the old one's arrays unless the gradients were ``finite``.

    The count of steps goes on (the batch is used up), and the scale is adjusted.
    """
    scale, good, interval = old.loss_scale
    grow = finite & (good + 1 >= interval)
    adjusted = LossScale(
        # From whatever an older state holds, infinity too, the scale comes back into its bounds.
        jnp.clip(jnp.where(finite, jnp.where(grow, scale * 2, scale), scale / 2), 1, LARGEST),
        jnp.where(finite & ~grow, good + 1, 0),
        interval,
    )
    chosen = tree_map(lambda n, o: jnp.where(finite, n, o), *(_arrays(s) for s in (new, old)))
    params, opt_state, model_state, learning = chosen
    return new._replace(
        params=params, opt_state=opt_state, model_state=model_state, loss_scale=adjusted,
        learning=learning,
    )


def check_compute_dtype(dtype):
    try:
        name = None if dtype is None else jnp.dtype(dtype).name
        if name is None or jnp.issubdtype(name, jnp.floating):
            return
    except TypeError:
        name = repr(dtype)
    raise ValueError(
        f"Networks compute with real numbers, got compute_dtype={name} expected a floating dtype: "
        "jnp.bfloat16 or jnp.float16."
    )


def check_scaled(dtype, scale):
    if scale is None and dtype is not None and jnp.dtype(dtype) == jnp.float16:
        raise ValueError(
            "Float16 gradients vanish below 6e-8 unless the loss is scaled, got a state with "
            "loss_scale=None; expected train.init(..., loss_scale=train.loss_scale())."
        )


def _arrays(state):
    return state.params, state.opt_state, state.model_state, state.learning
