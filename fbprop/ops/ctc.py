"""Connectionist temporal classification: the loss of labels whose places in time nobody knows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core.operation import Operation
from fbprop.core.precision import at_least_float32
from fbprop.ops.arguments import floating
from fbprop.rules import register


def ctc_loss(logits, labels, *, logit_lengths=None, label_lengths=None, blank: int = 0):
    """−log of the probability that frames spell the labels (Graves et al. 2006).

    A path has a class per frame; without repetitions and then blanks it spells its labels. With
    p = softmax(logits), and l' the labels with a blank before, between and after (S = 2 N + 1)::

        α_t(s) = log p_t(l'_s) + log Σ exp α_t−1 of s, s − 1, and, where l'_s is neither the
                 blank nor l'_s−2, of s − 2
        ℓ      = −log Σ exp α_T−1 of the last label and the blank after it
        z̄_t(k) = ℓ̄ (p_t(k) − Σ over s with l'_s = k of exp(α_t(s) + β_t(s) + ℓ))

    β, the same from the end without the frame's own p, is made in the backward pass. Of each frame
    α and β are held less their largest, so that long inputs lose no digits.

    | kept | shape | instead of |
    |---|---|---|
    | logits, labels, lengths; α; λ = log Σ exp z; ℓ | as given; [T, B, S]; [B, T, 1]; [B] | steps |

    In float32 at least. Labels that no path spells (more of them, with a blank between equal ones,
    than frames) cost inf, with gradient 0. Frames and labels beyond the lengths are not read.

    Args:
      logits: [B, T, K], floating; K classes with the blank.
      labels: [B, N] integers in 0 .. K − 1, none of the real ones the blank.
      logit_lengths, label_lengths: [B] integers, how many are real; None: all.
      blank: the class that spells nothing.

    Returns:
      Losses [B] in nats; float32 for 16-bit logits, otherwise their dtype.

    Raises:
      ValueError: shapes do not fit, or blank is no class.   TypeError: logits are not floating, or
        labels not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import ops
      >>> float(jnp.exp(-ops.ctc_loss(jnp.zeros((1, 2, 2)), jnp.array([[1]]))[0]))  # 3 of 4 paths
      0.75
    """
    logits, labels = floating("ctc_loss", logits), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"ctc_loss takes labels that are integers, got {labels.dtype.name}.")
    if logits.ndim != 3 or labels.ndim != 2 or labels.shape[0] != logits.shape[0]:
        raise ValueError("ctc_loss takes logits [B, T, K] and labels [B, N], got shapes "
                         f"{logits.shape} and {labels.shape}.")
    B, T, K = logits.shape
    if not 0 <= blank < K:
        raise ValueError(f"ctc_loss's blank is one of the {K} classes, got blank={blank} expected "
                         f"0 .. {K - 1}.")
    lengths = []
    for name, given, most in (("logit_lengths", logit_lengths, T),
                              ("label_lengths", label_lengths, labels.shape[1])):
        given = jnp.full(B, most, jnp.int32) if given is None else jnp.asarray(given, jnp.int32)
        if given.shape != (B,):
            raise ValueError(f"ctc_loss's {name} are one per example, got shape {given.shape} "
                             f"expected {(B,)}.")
        lengths.append(given)
    return _ctc(logits, labels, *lengths, blank=int(blank))


def _spelled(labels, blank):
    """l' [B, S], and where two places may be skipped to it [B, S]."""
    labels = labels.astype(jnp.int32)
    pairs = jnp.stack([jnp.full_like(labels, blank), labels], -1)
    pairs = pairs.reshape(len(labels), 2 * labels.shape[1])
    classes = jnp.pad(pairs, ((0, 0), (0, 1)), constant_values=blank)
    two_before = jnp.pad(classes, ((0, 0), (2, 0)), constant_values=-1)[:, :-2]
    return classes, (classes != blank) & (two_before >= 0) & (classes != two_before)


def _log_p(z, lam, classes):
    """log p_t(l'_s), [T, B, S]."""
    at = jnp.broadcast_to(classes[:, None], (*z.shape[:2], classes.shape[1]))
    return (jnp.take_along_axis(z, at, -1, mode="clip") - lam).swapaxes(0, 1)


def _shifted(a, by):
    """The number ``by`` places before each; -inf where none is."""
    none = [(0, 0), (by, 0)] if by > 0 else [(0, 0), (0, -by)]
    padded = jnp.pad(a, none, constant_values=-jnp.inf)
    return padded[:, :a.shape[1]] if by > 0 else padded[:, -by:]


def _log_sum(x, axis):
    """log Σ exp x, of nothing but -inf too: -inf, and its derivative 0, which JAX's is not."""
    most = lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    most = jnp.where(jnp.isfinite(most), most, 0)
    total = jnp.sum(jnp.exp(x - most), axis)
    log = jnp.squeeze(most, axis) + jnp.log(jnp.where(total > 0, total, 1))
    return jnp.where(total > 0, log, -jnp.inf)


def _arrived(a, direction, skips):
    """Of each place: what was there, and a place before, and two where these may be skipped."""
    two = jnp.where(skips, _shifted(a, 2 * direction), -jnp.inf)
    return _log_sum(jnp.stack([a, _shifted(a, direction), two]), 0)


def _near_zero(a):
    """Less their largest, which keeps the digits of what counts, and that."""
    most = lax.stop_gradient(jnp.max(a, -1))
    most = jnp.where(jnp.isfinite(most), most, 0)
    return a - most[:, None], most


def _ends(label_lengths, S):
    """Where a path may end: the last label and the blank after it."""
    last = 2 * label_lengths[:, None]
    place = jnp.arange(S, dtype=jnp.int32)
    return (place == last) | (place == last - 1)


def _forward(logits, labels, logit_lengths, label_lengths, *, blank):
    z = at_least_float32(logits)
    lam = jax.nn.logsumexp(z, -1, keepdims=True)
    classes, skips = _spelled(labels, blank)
    log_p, S = _log_p(z, lam, classes), classes.shape[1]
    # As if the frame before had been at the first blank; from there no label is skipped to.
    start = jnp.where(jnp.arange(S) == 0, 0, jnp.full_like(log_p[0], -jnp.inf))

    def step(carry, now):
        (a, off), (t, lp) = carry, now
        new, by = _near_zero(lp + _arrived(a, 1, skips))
        here = t < logit_lengths
        new, off = jnp.where(here[:, None], new, a), off + jnp.where(here, by, 0)
        return (new, off), new

    frames = jnp.arange(z.shape[1], dtype=jnp.int32)
    (last, off), alphas = lax.scan(step, (start, 0 * start[:, 0]), (frames, log_p))
    ends = jnp.where(_ends(label_lengths, S), last, -jnp.inf)
    return -(_log_sum(ends, -1) + off), lam, alphas


def _backward(dy, logits, labels, logit_lengths, label_lengths, out, lam, alphas, *, blank):
    z = at_least_float32(logits)
    classes, skips = _spelled(labels, blank)
    log_p, (B, S) = _log_p(z, lam, classes), classes.shape
    skips = jnp.pad(skips, ((0, 0), (0, 2)))[:, 2:]  # from here to two places on
    end = jnp.where(_ends(label_lengths, S), 0.0, -jnp.inf).astype(z.dtype)
    possible, rows = jnp.isfinite(out), jnp.arange(B)[:, None]

    def step(after, now):
        t, lp, a, zt, lam_t = now
        b = _arrived(after, -1, skips)
        b, _ = _near_zero(jnp.where((t == logit_lengths - 1)[:, None], end, b))
        total = _log_sum(a + b, -1)  # shares add up to 1: every path is at one place
        share = jnp.exp(a + b - jnp.where(jnp.isfinite(total), total, 0)[:, None])
        p = jnp.exp(zt - lam_t).at[rows, classes].add(-share, mode="drop")
        here = (possible & (t < logit_lengths))[:, None]
        return lp + b, jnp.where(here, dy[:, None] * p, 0)

    frames = jnp.arange(z.shape[1], dtype=jnp.int32)
    over = (frames, log_p, alphas, z.swapaxes(0, 1), lam.swapaxes(0, 1))
    _, dz = lax.scan(step, jnp.full_like(log_p[0], -jnp.inf), over, reverse=True)
    return dz.swapaxes(0, 1), None, None, None


def reference(logits, labels, logit_lengths, label_lengths, *, blank):
    """The same in probabilities, which underflow after some hundred frames."""
    p, (classes, skips) = jax.nn.softmax(at_least_float32(logits)), _spelled(labels, blank)
    S = classes.shape[1]

    def step(a, now):
        t, p = now
        before = a + jnp.pad(a, ((0, 0), (1, 0)))[:, :S]
        before += jnp.where(skips, jnp.pad(a, ((0, 0), (2, 0)))[:, :S], 0)
        new = before * jnp.take_along_axis(p, classes, -1)
        return jnp.where((t < logit_lengths)[:, None], new, a), None

    start = jnp.zeros(classes.shape, p.dtype).at[:, 0].set(1)
    frames = jnp.arange(p.shape[1], dtype=jnp.int32), p.swapaxes(0, 1)
    last, _ = lax.scan(step, start, frames)
    return -jnp.log(jnp.sum(jnp.where(_ends(label_lengths, S), last, 0), -1))


_ctc = Operation(
    "ctc_loss", "ℓ = −log Σ p(paths that spell y);  z̄ = ℓ̄ (p − share of paths through a class).  "
    "Keeps z, y, lengths, λ, α and ℓ.",
    reference, _forward, _backward, extras=("lam", "alphas"),
)
register(*_ctc.rules)
