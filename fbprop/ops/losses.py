"""Losses per example: kept are their operands, which stand there anyway, and a number per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fbprop.core.operation import Operation
from fbprop.core.precision import at_least_float32
from fbprop.ops.arguments import check_smoothing, floating
from fbprop.rules import register


def softmax_cross_entropy(logits, labels, *, label_smoothing: float = 0.0):
    """−log softmax(logits)[label], or −Σ p log softmax(logits) for labels that are shares p.

    λ = log Σ exp z;  ℓ = λ − z[label] or Σ p (λ − z);  z̄ = ℓ̄ (exp(z − λ) Σ p − p), p̄ = ℓ̄ (λ − z).
    With label smoothing ε (Szegedy et al. 2016) the target is 1 − ε times that plus ε / C on each
    of the C classes.

    | kept | shape | instead of |
    |---|---|---|
    | logits, labels; λ | as given; [..., 1] float32 | log-softmax, labels |

    Computed in float32 at least. A logit of −inf is a class that cannot be: probability and
    gradient 0, and nothing to pay where its share is 0; as the label it costs inf.

    Args:
      logits: [..., C], floating.
      labels: [...], integers, one outside 0..C−1 gives nan; or [..., C], floating shares.
      label_smoothing: ε in [0, 1).

    Returns:
      Losses [...] in nats; float32 for 16-bit logits, otherwise their dtype.

    Raises:
      ValueError: labels of another shape; label_smoothing out of range.
      TypeError: logits or shares are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.softmax_cross_entropy(jnp.array([[1e4, 0.0], [0.0, -jnp.inf]]), jnp.array([1, 0]))
      Array([10000.,     0.], dtype=float32)
    """
    logits, labels = floating("softmax_cross_entropy", logits), jnp.asarray(labels)
    check_smoothing(label_smoothing)
    if logits.ndim and jnp.issubdtype(labels.dtype, jnp.integer):
        _same("softmax_cross_entropy", labels, logits.shape[:-1])
        return _softmax_of_class(logits, labels, smoothing=float(label_smoothing))
    labels = floating("softmax_cross_entropy", labels)
    _same("softmax_cross_entropy", labels, logits.shape)
    if label_smoothing:
        labels = labels * (1 - label_smoothing) + label_smoothing / labels.shape[-1]
    return _softmax_of_shares(logits, labels)


def sigmoid_cross_entropy(logits, labels):
    """−y log σ(z) − (1 − y) log σ(−z), element by element; kept are logits z and labels y.

    z̄ = ℓ̄ (σ(z) − y), ȳ = −ℓ̄ z. Computed in float32 at least. A logit of ±inf that says what its
    label says costs 0, one that does not costs inf.

    Args:
      logits: floating.
      labels: of its shape: probabilities, integers or bools.

    Returns:
      Losses of that shape, in nats; float32 for 16-bit logits, otherwise their dtype.

    Raises:
      ValueError: labels of another shape.   TypeError: logits are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.sigmoid_cross_entropy(jnp.array([1e4, jnp.inf]), jnp.array([0, 1])).tolist()
      [10000.0, 0.0]
    """
    logits, labels = floating("sigmoid_cross_entropy", logits), jnp.asarray(labels)
    _same("sigmoid_cross_entropy", labels, logits.shape)
    return _sigmoid(logits, labels)


def huber(predictions, targets, *, delta: float = 1.0):
    """e² / 2 where |e| ≤ delta, else delta (|e| − delta / 2), e = prediction − target (Huber 1964).

    ē = ℓ̄ clip(e, −delta, delta). Kept are predictions and targets. In float32 at least, element by
    element.

    Args:
      predictions, targets: floating, of one shape.
      delta: above 0.

    Raises:
      ValueError: the shapes differ; delta is not above 0.   TypeError: not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> ops.huber(jnp.array([1.0, 300.0]), jnp.zeros(2)).tolist()
      [0.5, 299.5]
    """
    predictions, targets = floating("huber", predictions), floating("huber", targets)
    _same("huber", targets, predictions.shape)
    if not delta > 0:
        raise ValueError(f"huber is linear beyond delta, got delta={delta} expected one above 0.")
    return _huber(predictions, targets, delta=float(delta))


def _same(name, x, shape):
    if x.shape != shape:
        raise ValueError(f"{name} got labels or targets of shape {x.shape} expected {shape}.")


def _paid(share, cost):
    """Their product; what has no share costs nothing even where it would cost inf."""
    return jnp.where((share == 0) & jnp.isinf(cost), 0, share * cost)


def _of_class(z, labels):
    """z[label], nan for one outside."""
    labels = labels.astype(int)  # 8 bits may not hold the number of classes
    at = jnp.where(labels < 0, z.shape[-1], labels)[..., None]
    return jnp.take_along_axis(z, at, -1, mode="fill", fill_value=jnp.nan)


def _class_reference(logits, labels, *, smoothing):
    log_p = jax.nn.log_softmax(at_least_float32(logits))
    chosen = jnp.squeeze(_of_class(log_p, labels), -1)
    return -(1 - smoothing) * chosen - smoothing * jnp.mean(log_p, -1)


def _class_forward(logits, labels, *, smoothing):
    z = at_least_float32(logits)
    lam = jax.nn.logsumexp(z, -1, keepdims=True)
    losses = lam - _of_class(z, labels)
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (lam - jnp.mean(z, -1, keepdims=True))
    return jnp.squeeze(losses, -1), lam


def _class_backward(dy, logits, labels, lam, *, smoothing):
    p = jnp.exp(at_least_float32(logits) - lam)
    mine = jnp.arange(p.shape[-1]) == labels.astype(int)[..., None]
    target = jnp.where(mine, 1 - smoothing, 0)
    if smoothing:
        target = target + smoothing / p.shape[-1]
    return dy[..., None] * (p - target), None


_softmax_of_class = Operation(
    "softmax_cross_entropy", "ℓ = λ − (1 − ε) z[y] − ε mean z, λ = log Σ exp z;  "
    "z̄ = ℓ̄ (exp(z − λ) − (1 − ε) onehot y − ε / C).  Keeps z, y and λ.",
    _class_reference, _class_forward, _class_backward, extras=("lam",),
)


def _shares_forward(logits, labels):
    z = at_least_float32(logits)
    lam = jax.nn.logsumexp(z, -1, keepdims=True)
    return jnp.sum(_paid(labels.astype(z.dtype), lam - z), -1), lam


def _shares_backward(dy, logits, labels, lam):
    dy, z = dy[..., None], at_least_float32(logits)
    p = labels.astype(z.dtype)
    return dy * (jnp.exp(z - lam) * jnp.sum(p, -1, keepdims=True) - p), dy * (lam - z)


_softmax_of_shares = Operation(
    "softmax_cross_entropy_of_shares", "ℓ = Σ p (λ − z), λ = log Σ exp z;  "
    "z̄ = ℓ̄ (exp(z − λ) Σ p − p), p̄ = ℓ̄ (λ − z).  Keeps z, p and λ.",
    lambda logits, labels: -jnp.sum(labels * jax.nn.log_softmax(at_least_float32(logits)), -1),
    _shares_forward, _shares_backward, extras=("lam",),
)


def _sigmoid_forward(logits, labels):
    z = at_least_float32(logits)
    y = labels.astype(z.dtype)
    return _paid(y, jax.nn.softplus(-z)) + _paid(1 - y, jax.nn.softplus(z))


def _sigmoid_backward(dy, logits, labels):
    z = at_least_float32(logits)
    return dy * (jax.nn.sigmoid(z) - labels.astype(z.dtype)), -dy * z


_sigmoid = Operation(
    "sigmoid_cross_entropy", "ℓ = −y log σ(z) − (1 − y) log σ(−z);  z̄ = ℓ̄ (σ(z) − y), ȳ = −ℓ̄ z.  "
    "Keeps z and y.",
    _sigmoid_forward, _sigmoid_forward, _sigmoid_backward,
)


def _huber_forward(predictions, targets, *, delta):
    e = jnp.abs(at_least_float32(predictions) - at_least_float32(targets))
    inner = jnp.minimum(e, delta)
    return jnp.square(inner) / 2 + delta * (e - inner)


def _huber_backward(dy, predictions, targets, *, delta):
    e = at_least_float32(predictions) - at_least_float32(targets)
    de = dy * jnp.clip(e, -delta, delta)
    return de, -de


_huber = Operation(
    "huber", "ℓ = e² / 2 within ±δ, linear beyond;  ē = ℓ̄ clip(e, −δ, δ).  Keeps both operands.",
    _huber_forward, _huber_forward, _huber_backward,
)
register(*_softmax_of_class.rules, *_softmax_of_shares.rules, *_sigmoid.rules, *_huber.rules)
