"""Layers that standardise: by features, by groups of channels, by batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fbprop import ops
from fbprop.core.precision import at_least_float32, wide_dtype
from fbprop.nn import initializers
from fbprop.nn.layer import Layer
from fbprop.nn.shapes import check_width


def layer_norm(*, epsilon: float = 1e-5, scale: bool = True, bias: bool = True,
               dtype=jnp.float32, name: str = "layer_norm") -> Layer:
    """(x − mean) / sqrt(variance + epsilon) · scale + bias over the last dimension.

    Mean and variance (divided by n) are computed in float32 at least. Ba, Kiros & Hinton 2016.
    Parameters: ``scale`` [features], at first 1; ``bias`` [features], at first 0.

    Args:
      epsilon: added to the variance, so that a constant row gives 0.
      scale, bias: whether there is one.
      dtype: of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> init, apply = nn.layer_norm(epsilon=0.0)
      >>> x = jnp.array([[1.0, 3.0]])
      >>> apply(init(jax.random.key(0), x), x).tolist()
      [[-1.0, 1.0]]
    """

    def apply(params, x):
        return ops.layer_norm(*_with_affine(name, params, x), epsilon=epsilon)

    return Layer(_affine_init(scale, bias, dtype), apply, name)


def rms_norm(*, epsilon: float = 1e-6, scale: bool = True, dtype=jnp.float32,
             name: str = "rms_norm") -> Layer:
    """x / sqrt(mean of x² + epsilon) · scale over the last dimension (Zhang & Sennrich 2019).

    The mean is computed in float32 at least. Parameters: ``scale`` [features], at first 1.

    Args:
      epsilon: added to the mean, so that a row of zeros gives 0.
      scale: whether there is one.
      dtype: of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> init, apply = nn.rms_norm(epsilon=0.0)
      >>> x = jnp.array([[3.0, 3.0], [-2.0, 2.0]])
      >>> apply(init(jax.random.key(0), x), x).tolist()
      [[1.0, 1.0], [-1.0, 1.0]]
    """

    def apply(params, x):
        return ops.rms_norm(*_with_affine(name, params, x)[:2], epsilon=epsilon)

    return Layer(_affine_init(scale, False, dtype), apply, name)


def group_norm(groups: int = 32, *, epsilon: float = 1e-5, scale: bool = True, bias: bool = True,
               dtype=jnp.float32, name: str = "group_norm") -> Layer:
    """As `layer_norm`, over each example's groups of channels and all their positions.

    [B, *spatial, C] is standardised over the spatial dimensions and C / groups neighbouring
    channels; scale and bias are per channel [C]. Wu & He 2018. One group per channel is instance
    norm.

    Args:
      groups: how many; a divisor of C.
      epsilon, scale, bias, dtype: as for `layer_norm`.

    Raises:
      ValueError: groups does not divide C.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> init, apply = nn.group_norm(2, epsilon=0.0)
      >>> x = jnp.array([[1.0, 3.0, -5.0, 5.0]])
      >>> apply(init(jax.random.key(0), x), x).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    def apply(params, x):
        if x.shape[-1] % groups:
            raise ValueError(
                f"Layer {name!r} splits channels into equal groups, got groups={groups} expected "
                f"a divisor of {x.shape[-1]} channels."
            )
        return ops.group_norm(*_with_affine(name, params, x), groups=groups, epsilon=epsilon)

    return Layer(_affine_init(scale, bias, dtype), apply, name)


def batch_norm(*, momentum: float = 0.9, epsilon: float = 1e-5, axis_name=None, parts: int = 1,
               scale: bool = True, bias: bool = True, dtype=jnp.float32,
               name: str = "batch_norm") -> Layer:
    """(x − mean) / sqrt(variance + epsilon) · scale + bias, over all dimensions but the last.

    In training mean and variance are the batch's, and the running ones become
    ``momentum · running + (1 − momentum) · batch's``; in use the running ones take their place.
    Ioffe & Szegedy 2015. The variance is divided by n, the running one too, as in Flax and Keras;
    PyTorch's running variance is divided by n − 1, and its momentum is 1 − this one. All of it is
    in float32 at least, the variance a mean of centred squares: E[x²] − E[x]² would lose 3% at a
    mean of 1,000 standard deviations.

    Parameters: ``scale`` [C], at first 1; ``bias`` [C], at first 0. State: ``mean`` [C], at first
    0; ``variance`` [C], at first 1. Padding of sequences counts as any other element.

    Args:
      momentum: weight of the past in the running statistics, in [0, 1].
      epsilon: added to the variance.
      axis_name: of the mapped axis (`jax.shard_map`, `jax.vmap`), or several, over whose parts of
        equal size the statistics are averaged; None: each part has its own.
      parts: into how many equal parts the batch is cut, each standardised by statistics of its own,
        of which the running ones take the mean (Hoffer et al. 2017, "ghost" batches). On a mesh
        the batch is all devices'; with as many parts as devices share it, they send nothing.
      scale, bias: whether there is one.
      dtype: of the parameters.

    Raises:
      ValueError: momentum out of range; `apply` without a state; a batch that parts do not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> norm, x = nn.batch_norm(epsilon=0.0), jnp.array([[10.0], [30.0]])
      >>> params, state = norm.init(jax.random.key(0), x), norm.init_state(x)
      >>> y, state = norm.apply(params, x, train=True, state=state)
      >>> y.tolist(), state["mean"].tolist()
      ([[-1.0], [1.0]], [2.0])
      >>> y, _ = norm.apply(params, x, state={"mean": jnp.zeros(1), "variance": jnp.full(1, 4.0)})
      >>> y.tolist()
      [[5.0], [15.0]]
    """
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"batch_norm's momentum is the weight of the past, got {momentum} expected a number "
            "in [0, 1], near 1."
        )

    def init_state(x):
        wide = wide_dtype(x.dtype)
        return {"mean": jnp.zeros(x.shape[-1], wide), "variance": jnp.ones(x.shape[-1], wide)}

    def apply(params, x, *, train, state):
        if train and axis_name is None:
            x, scale, bias = _with_affine(name, params, x)
            y, mean, variance = _by_parts(name, parts, x, scale, bias, epsilon)
            return y, _all_moved(state, mean, variance, momentum)
        wide = at_least_float32(x)
        mean, variance = _shared_statistics(wide, axis_name) if train else (
            state["mean"].astype(wide.dtype), state["variance"].astype(wide.dtype))
        y = (wide - mean) * lax.rsqrt(variance + epsilon)
        state = _all_moved(state, mean, variance, momentum) if train else state
        return _affine(name, params, y.astype(x.dtype)), state

    return Layer(_affine_init(scale, bias, dtype), apply, name, init_state)


def _by_parts(name, parts, x, scale, bias, epsilon):
    """`fbprop.ops.batch_norm` of each part of a batch; means of the parts' statistics."""
    if parts == 1:
        return ops.batch_norm(x, scale, bias, epsilon=epsilon)
    if x.shape[0] % parts:
        raise ValueError(
            f"Layer {name!r} cuts the batch into equal parts, got {x.shape[0]} examples expected a "
            f"multiple of parts={parts}."
        )
    each = x.reshape(parts, -1, *x.shape[1:])
    y, mean, variance = jax.vmap(lambda x: ops.batch_norm(x, scale, bias, epsilon=epsilon))(each)
    return y.reshape(x.shape), jnp.mean(mean, axis=0), jnp.mean(variance, axis=0)


def _shared_statistics(x, axis_name):
    """Mean and variance over all dimensions but the last, and over the parts of a mapped axis."""
    axes = tuple(range(x.ndim - 1))
    mean = lax.pmean(jnp.mean(x, axis=axes), axis_name)
    return mean, lax.pmean(jnp.mean(jnp.square(x - mean), axis=axes), axis_name)


def _all_moved(state, mean, variance, momentum):
    """The running statistics, moved towards the batch's."""
    batch = {"mean": mean, "variance": variance}
    return {
        key: momentum * running
        + (1 - momentum) * lax.stop_gradient(batch[key]).astype(running.dtype)
        for key, running in state.items()
    }


def _affine_init(scale, bias, dtype):
    def init(key, x):
        shape = x.shape[-1:]
        params = {"scale": initializers.ones(key, shape, dtype)} if scale else {}
        return params | ({"bias": initializers.zeros(key, shape, dtype)} if bias else {})

    return init


def _with_affine(name, params, x):
    """The input in the type of the result, scale and bias; None for one that is not there."""
    for each in params.values():
        check_width(name, x, each.shape[0])
    kind = jnp.result_type(x, *params.values())
    return x.astype(kind), *(
        params[key].astype(kind) if key in params else None for key in ("scale", "bias"))


def _affine(name, params, y):
    for each in params.values():
        check_width(name, y, each.shape[0])
    y = y * params["scale"] if "scale" in params else y
    return y + params["bias"] if "bias" in params else y
