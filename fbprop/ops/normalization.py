"""Normalisations: what is kept is the input and two numbers per group that is standardised.

    h = (x − μ) r, r = 1 / sqrt(σ² + ε), y = h · scale + bias, over groups of n elements
    x̄ = r (g − Σ g / n − h Σ g h / n), g = ȳ · scale;  scale̅ = Σ ȳ h, bias̅ = Σ ȳ
    RMS norm, without μ: x̄ = r (g − h Σ g h / n)

h is made again from x. The variance is the mean of centred squares, in float32 at least:
E[x²] − E[x]² loses 3% at a mean of 1,000 standard deviations.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from fbprop.core.devices import at_lowering, in_words, own_broadcasting
from fbprop.core.opaque import held, made_of
from fbprop.core.operation import Operation
from fbprop.core.precision import at_least_float32
from fbprop.rules import register

# On CPUs, rows of more elements than this are passed back a few at a time, which stay in the cache.
LARGE, ROWS = 1 << 19, 256


def layer_norm(x, scale=None, bias=None, *, epsilon: float = 1e-5, residual=None):
    """(x − mean) / sqrt(variance + epsilon) · scale + bias over the last dimension.

    | kept | shape | instead of |
    |---|---|---|
    | x, scale; mean, variance | [..., D], [D]; [..., 1] float32 | x, centred x, h, each [..., D] |

    Ba, Kiros & Hinton 2016. Computed in float32 at least.

    Args:
      x: [..., D], floating.
      scale, bias: [D], or None.
      epsilon: added to the variance: a constant row gives 0.
      residual: [..., D], added to x first; the result is then ``(y, x + residual)``.

    Returns:
      y in x's shape and dtype.

    Raises:
      ValueError: shapes that do not fit.   TypeError: x is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.layer_norm(jnp.array([[1.0, 3.0]]), epsilon=0.0).tolist()
      [[-1.0, 1.0]]
    """
    return _over_last("layer_norm", x, scale, bias, epsilon, residual, True)


def rms_norm(x, scale=None, *, epsilon: float = 1e-6, residual=None):
    """x / sqrt(mean of x² + epsilon) · scale over the last dimension (Zhang & Sennrich 2019).

    | kept | shape | instead of |
    |---|---|---|
    | x, scale; mean of x² | [..., D], [D]; [..., 1] float32 | x, h, each [..., D] |

    Args:
      x, scale, epsilon, residual: as for `layer_norm`.

    Returns:
      y in x's shape and dtype; with ``residual``, ``(y, x + residual)``.

    Raises:
      ValueError, TypeError: as `layer_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.rms_norm(jnp.array([[3.0, 3.0], [-2.0, 2.0]]), epsilon=0.0).tolist()
      [[1.0, 1.0], [-1.0, 1.0]]
    """
    return _over_last("rms_norm", x, scale, None, epsilon, residual, False)


def group_norm(x, scale=None, bias=None, *, groups: int = 32, epsilon: float = 1e-5):
    """As `layer_norm`, over each example's groups of channels and all their positions.

    Wu & He 2018. One group per channel is instance norm. Kept as by `layer_norm`.

    Args:
      x: [B, *spatial, C], floating.
      scale, bias: [C], or None.
      groups: a divisor of C; each is of C / groups neighbouring channels.
      epsilon: added to the variance.

    Returns:
      y in x's shape and dtype.

    Raises:
      ValueError: groups does not divide C; shapes that do not fit.   TypeError: x is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.group_norm(jnp.array([[1.0, 3.0, -5.0, 5.0]]), groups=2, epsilon=0.0).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """
    x = _checked("group_norm", x, scale, bias)
    if not isinstance(groups, int) or groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"group_norm splits channels into equal groups, got groups={groups} expected a divisor "
            f"of {x.shape[-1]} channels."
        )
    apart = (groups, x.shape[-1] // groups)
    scale, bias = (None if a is None else jnp.reshape(a, apart) for a in (scale, bias))
    axes = (*range(1, x.ndim - 1), x.ndim)
    y = normalize(x.reshape(*x.shape[:-1], *apart), scale, bias, axes=axes,
                  epsilon=float(epsilon), centred=True, features=2)
    return y.reshape(x.shape)


def batch_norm(x, scale=None, bias=None, *, epsilon: float = 1e-5):
    """(x − mean) / sqrt(variance + epsilon) · scale + bias, over all dimensions but the last.

    Ioffe & Szegedy 2015, in training: by the batch's own statistics.

    | kept | shape | instead of |
    |---|---|---|
    | x, scale; mean, variance | [..., C], [C]; [C] float32 | x, centred x, h, each [..., C] |

    Args:
      x: [..., C], floating.
      scale, bias: [C], or None.
      epsilon: added to the variance.

    Returns:
      y in x's shape and dtype; mean and variance (divided by n), [C], float32 at least.

    Raises:
      ValueError: shapes that do not fit.   TypeError: x is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> y, mean, variance = ops.batch_norm(jnp.array([[10.0], [30.0]]), epsilon=0.0)
      >>> y.tolist(), mean.tolist(), variance.tolist()
      ([[-1.0], [1.0]], [20.0], [100.0])
    """
    x = _checked("batch_norm", x, scale, bias)
    y, mean, variance = normalize.everything(
        x, scale, bias, axes=tuple(range(x.ndim - 1)), epsilon=float(epsilon), centred=True,
        features=1)
    with own_broadcasting():
        y = made_of(y, _standardised(x, scale, bias, mean, variance, float(epsilon)))
    return y, mean.reshape(-1), variance.reshape(-1)


def _over_last(name, x, scale, bias, epsilon, residual, centred):
    x = _checked(name, x, scale, bias)
    if residual is not None:
        if jnp.shape(residual) != x.shape:
            raise ValueError(
                f"{name} adds residual to x, got shape {jnp.shape(residual)} expected {x.shape}."
            )
        x = x + residual
    y = normalize(x, scale, bias, axes=(x.ndim - 1,), epsilon=float(epsilon), centred=centred,
                  features=1)
    return y if residual is None else (y, x)


def _checked(name, x, scale, bias):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim == 0:
        raise TypeError(
            f"{name} takes floating numbers [..., features], got {x.dtype.name}{list(x.shape)}: "
            "cast the input."
        )
    for what, array in (("scale", scale), ("bias", bias)):
        if array is not None and jnp.shape(array) != x.shape[-1:]:
            raise ValueError(
                f"{what} of {name} has shape {jnp.shape(array)}, expected {x.shape[-1:]} for an "
                f"input of shape {x.shape}."
            )
    return x


def reference(x, scale, bias, *, axes, epsilon, centred, features):
    """In plain code."""
    wide = at_least_float32(x)
    h = wide - jnp.mean(wide, axes, keepdims=True) if centred else wide
    h = h * lax.rsqrt(jnp.mean(jnp.square(h), axes, keepdims=True) + epsilon)
    h = h if scale is None else h * scale.astype(h.dtype)
    return (h if bias is None else h + bias.astype(h.dtype)).astype(x.dtype)


def _forward(x, scale, bias, *, axes, epsilon, centred, features):
    wide = at_least_float32(x)
    mean = jnp.mean(wide, axes, keepdims=True)
    mean = mean if centred else jnp.zeros_like(mean)
    variance = jnp.mean(jnp.square(wide - mean), axes, keepdims=True)
    return _standardised(x, scale, bias, mean, variance, epsilon), mean, variance


def _standardised(x, scale, bias, mean, variance, epsilon):
    h = (at_least_float32(x) - mean) * lax.rsqrt(variance + epsilon)
    h = h if scale is None else h * scale.astype(h.dtype)
    return (h if bias is None else h + bias.astype(h.dtype)).astype(x.dtype)


def _backward(dy, x, scale, mean, variance, *, axes, epsilon, centred, features):
    arrays = [a for a in (scale, dy, x, mean, variance) if a is not None]
    form, none = (axes, epsilon, centred, features), () if scale is not None else (None,)

    def by(way):
        def run(*arrays):
            return way(form, *none, *arrays)

        return run

    forms = {"cpu": by(_by_rows)} if _many_rows(x, axes) else {}
    if axes == tuple(range(x.ndim - features)):
        forms = {"cpu": by(_pulled_apart)}
    return at_lowering(*arrays, default=by(_pulled), **forms)


def _many_rows(x, axes):
    return axes == (x.ndim - 1,) and x.size >= LARGE


def _formulation(site):
    by_rows = _many_rows(site.in_avals[0], dict(site.params["static"])["axes"])
    return in_words(site.platform, "row by row", "cpu") if by_rows else ""


def _pulled(form, scale, dy, x, mean, variance):
    axes, epsilon, centred, features = form
    kind, n = variance.dtype, max(math.prod(x.shape[a] for a in axes), 1)
    dy, r = dy.astype(kind), lax.rsqrt(variance + epsilon)
    h = (x.astype(kind) - mean) * r
    over = tuple(range(x.ndim - features))
    dscale, dbias = jnp.sum(dy * h, over), jnp.sum(dy, over)
    scale = jnp.ones((), kind) if scale is None else scale.astype(kind)
    if axes == over:  # one scale for a group: its sums are these
        along, mean_of_g = dscale / n, dbias / n
        dx = dy - h * along - (mean_of_g if centred else 0)
        return [r * scale * dx, dscale, dbias]
    g = dy * scale
    dx = g - h * (jnp.sum(g * h, axes, keepdims=True) / n)
    if centred:
        dx = dx - jnp.sum(g, axes, keepdims=True) / n
    return [r * dx, dscale, dbias]


def _pulled_apart(form, scale, dy, x, mean, variance):
    """With h made again, which XLA else keeps from the forward pass."""
    return _pulled(form, scale, dy, x, held(mean, dy) if dy.size else mean, variance)


def _by_rows(form, scale, dy, x, *statistics):
    """A few rows after the other: 8192 x 768 take 0.40 of `jax.grad`'s time, at once 0.93."""
    flat = [a.reshape(-1, a.shape[-1]) for a in (dy, x, *statistics)]
    rows, kind = len(flat[0]), statistics[0].dtype
    many = rows // ROWS
    one = lambda parts: _pulled(((1,), *form[1:]), scale, *parts)

    def body(sums, parts):
        dx, *more = one(parts)
        return [a + b for a, b in zip(sums, more)], dx

    zeros = [jnp.zeros(x.shape[-1], kind) for _ in range(2)]
    first = [a[:many * ROWS].reshape(many, ROWS, a.shape[1]) for a in flat]
    sums, dx = lax.scan(body, zeros, first)
    dx = dx.reshape(many * ROWS, -1)
    if rest := rows - many * ROWS:
        sums, last = body(sums, [a[-rest:] for a in flat])
        dx = jnp.concatenate([dx, last])
    return [dx.reshape(x.shape), *sums]


normalize = Operation(
    "normalize",
    "y = h scale + bias, h = (x − μ) r, r = 1 / √(σ² + ε) over axes;  x̄ = r (g − Σ g / n − "
    "h Σ g h / n), g = ȳ scale, scale̅ = Σ ȳ h, bias̅ = Σ ȳ; of RMS norm without μ and Σ g / n.",
    reference, _forward, _backward, extras=("mean", "variance"),
    formulation=_formulation,
)
register(*normalize.rules)
