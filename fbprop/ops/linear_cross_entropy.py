"""A linear layer and its cross-entropy as one: no array of logits, its backward in the forward."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core.devices import at_lowering
from fbprop.core.operation import Operation
from fbprop.core.precision import wide_dtype
from fbprop.ops import softmax_tiles
from fbprop.ops.arguments import check_smoothing
from fbprop.rules import register

# Rows of a chunk, and how many times D they are on CPUs and elsewhere, where w̄ is read and written
# once per chunk: N65536 D768 V50304 in bfloat16, compiled for an H100, moves 1.06 of plain code's
# bytes with D rows and 0.81 with 2 D; on a CPU N4096 D256 V8192 takes 0.81 and 0.97 of the time.
LEAST, MOST = 256, 4096
CHUNKS = 1, 2


def linear_cross_entropy(x, w, labels, *, bias=None, ignore_index: int | None = None,
                         label_smoothing: float = 0.0, z_loss: float = 0.0,
                         soft_cap: float | None = None, weights=None, reduction: str = "mean"):
    """Cross-entropy of softmax(x w + bias), row by row, without the logits of all rows.

    z = x w + bias, or soft_cap · tanh(z / soft_cap);  with λ = log Σ exp z and ε = label_smoothing,
    ℓ = λ − (1 − ε) z[label] − ε mean(z) + z_loss · λ²;
    z̄ = exp(z − λ)(1 + 2 z_loss λ) − (1 − ε) onehot − ε / V,  x̄ = z̄ wᵀ,  w̄ = xᵀ z̄,  bias̄ = Σ z̄.

    | kept | shape | instead of |
    |---|---|---|
    | x̄, w̄, bias̄ where ȳ = 1, if wanted; ℓ | of x, w, bias; [N] | x, w, log-softmax [N, V] |
    | reduction="none": x, w, bias, labels | as given | the same |

    A sum or mean passes one number back, so its gradient is formed in the forward pass, by chunks
    of D rows on a CPU and 2 D elsewhere (256 to 4096): on a CPU the logits of N4096 D256 V8192 take
    8 MB for 134. Without a reduction the chunks are computed again. On one TPU, of 512 classes or
    more without soft_cap, in bfloat16 or where products of float32 are of bfloat16 (JAX's default
    there), a Pallas kernel writes a chunk's exponentials, in bfloat16, for its logits;
    `fbprop.explain` says so, and why not. In a program for several devices all rows are one chunk,
    so that nothing more is sent between them than of the plain code. Under `jax.vmap` each of the
    batch has a w̄ of its own: give all rows at once. After Wijmans et al. 2024 (cut cross-entropy)
    and Hsu et al. 2024 (Liger kernels).

    Args:
      x: [..., D], floating; products of 16-bit numbers add up in float32.
      w: [D, V], of x's dtype.
      labels: [...], integers; one outside 0..V−1 gives nan.
      bias: [V].
      ignore_index: rows with this label count nothing and are not read.
      label_smoothing: ε in [0, 1): the target is 1 − ε on the label and ε / V on every class.
      z_loss: weight of λ² (Chowdhery et al. 2022).
      soft_cap: bounds logits to ±soft_cap.
      weights: [...], of rows; those of weight 0 are not read.
      reduction: "mean" (Σ weight · ℓ / Σ weight), "sum" or "none".

    Returns:
      A scalar or, for "none", losses [...]; float32 for 16-bit x, otherwise x's dtype. The mean
      of no rows is 0.

    Raises:
      TypeError, ValueError: types, shapes or numbers that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import ops
      >>> x, w = jnp.ones((5, 3)), jnp.zeros((3, 4))
      >>> float(ops.linear_cross_entropy(x, w, jnp.arange(5) % 4)).__round__(4)
      1.3863
    """
    x, w, labels = jnp.asarray(x), jnp.asarray(w), jnp.asarray(labels)
    _check(x, w, labels, bias, weights, label_smoothing, soft_cap, reduction)
    wide = wide_dtype(x.dtype)
    share = jnp.ones(labels.shape, wide) if weights is None else jnp.asarray(weights).astype(wide)
    if ignore_index is not None:
        counts = labels != ignore_index
        share, labels = jnp.where(counts, share, 0), jnp.where(counts, labels, 0)
    if reduction == "mean":
        total = jnp.sum(share)
        share = share / jnp.where(total == 0, 1, total)
    flat = x.reshape(labels.size, x.shape[-1])
    bias = None if bias is None else jnp.asarray(bias)
    losses = (cross_entropies if reduction == "none" else cross_entropy)(
        flat, w, bias, share.reshape(-1), labels.reshape(-1).astype(jnp.int32),
        form=Form(float(label_smoothing), float(z_loss), soft_cap and float(soft_cap)),
    )
    return losses.reshape(labels.shape) if reduction == "none" else losses


class Form(NamedTuple):
    """What is static: ε, the weight of λ², and what bounds the logits."""

    smoothing: float = 0.0
    z_loss: float = 0.0
    cap: float | None = None


def reference(x, w, bias, share, labels, *, form):
    """Losses times their rows' share, in plain code."""
    z = jnp.matmul(x, w, preferred_element_type=wide_dtype(x.dtype))
    z = z if bias is None else z + bias.astype(z.dtype)
    z = z if form.cap is None else form.cap * jnp.tanh(z / form.cap)
    lse = jax.nn.logsumexp(z, axis=-1)
    chosen = jnp.take_along_axis(z, labels[:, None], axis=-1, mode="fill", fill_value=jnp.nan)[:, 0]
    losses = lse - (1 - form.smoothing) * chosen - form.smoothing * jnp.mean(z, axis=-1)
    return share.astype(z.dtype) * (losses + form.z_loss * lse**2)


class ByLogits:
    """How a chunk of rows is done: its logits are an array. `ByTiles` is by the kernel for TPUs.

    Attributes:
      carry: w̄ and bias̄ of no rows, each of no elements where it is not wanted.
    """

    def __init__(self, form, wants, w, bias):
        self.form, self.wants, self.w, self.bias = form, wants, w, bias
        kind = wide_dtype(w.dtype)
        self.carry = (jnp.zeros(w.shape if wants[1] else (0,), kind),
                      jnp.zeros(w.shape[1:] if wants[2] else (0,), kind))

    def chunk(self, carry, x, labels, d):
        """A chunk's losses and x̄, and the carry with what it adds to w̄ and bias̄."""
        kind, (dw, db) = wide_dtype(x.dtype), carry
        losses, g = self._rows(x, labels, d)
        if self.wants[1]:
            dw = dw + lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=kind)
        if self.wants[2]:
            db = db + jnp.sum(g, 0, dtype=kind)
        dx = jnp.zeros((len(x), 0), x.dtype)
        if self.wants[0]:
            dx = lax.dot_general(g, self.w, (((1,), (1,)), ((), ())), preferred_element_type=kind)
        return (dw, db), (losses, dx.astype(x.dtype))

    def whole(self, carry):
        """w̄ and bias̄."""
        return carry

    def _rows(self, x, labels, d):
        """Losses of rows, and z̄ where those of the losses are ``d``."""
        form, kind = self.form, wide_dtype(x.dtype)
        s = lax.dot_general(x, self.w, (((1,), (0,)), ((), ())), preferred_element_type=kind)
        s = s if self.bias is None else s + self.bias.astype(s.dtype)
        z = s if form.cap is None else form.cap * jnp.tanh(s / form.cap)
        top = jnp.max(z, -1, keepdims=True, initial=-jnp.inf)
        e = jnp.exp(z - top)
        total = jnp.sum(e, -1, keepdims=True)
        lse = top + jnp.log(total)
        hit = lax.broadcasted_iota(jnp.int32, z.shape, 1) == labels[:, None]
        chosen = jnp.sum(jnp.where(hit, z, 0), -1)
        losses = lse[:, 0] - (1 - form.smoothing) * chosen + form.z_loss * lse[:, 0] ** 2
        if form.smoothing:
            losses = losses - form.smoothing * jnp.mean(z, -1)
        d = d[:, None]
        g = e * (d * (1 + 2 * form.z_loss * lse) / total)
        g = g - jnp.where(hit, (1 - form.smoothing) * d, 0)
        if form.smoothing:
            g = g - form.smoothing / z.shape[1] * d
        g = g if form.cap is None else g * (1 - jnp.square(z / form.cap))
        return losses, g.astype(x.dtype)


def _chunk(way, classes, carry, rows):
    """A chunk's losses times share and x̄, and the carry after it."""
    x, share, labels, d = rows
    x = jnp.where((share == 0)[:, None], 0, x)  # what does not count is not read
    kind = wide_dtype(x.dtype)
    share, d = share.astype(kind), d.astype(kind)
    carry, (losses, dx) = way.chunk(carry, x, labels, d)
    outside = jnp.where((labels >= 0) & (labels < classes), jnp.zeros_like(share), jnp.inf)
    # ∞ − ∞ is nan: written as one it is found by `jax_debug_nans` where it is not taken.
    losses = losses + (outside - outside)
    return carry, (jnp.where(share == 0, 0, share * losses), dx)


def _by_chunks(way, size, w, bias, *rows):
    """Losses [N] and x̄, w̄, bias̄, each of no elements where it is not wanted."""
    n, carry, outs = len(rows[0]), way.carry, []
    chunk = functools.partial(_chunk, way, w.shape[1])
    many = n // size
    if many > 1:
        parts = [a[:many * size].reshape(many, size, *a.shape[1:]) for a in rows]
        carry, ys = lax.scan(chunk, carry, parts)
        outs.append([y.reshape(many * size, *y.shape[2:]) for y in ys])
    rest = many * size if many > 1 else 0
    if rest < n or n == 0:
        carry, ys = chunk(carry, [a[rest:] for a in rows])
        outs.append(ys)
    losses, dx = (jnp.concatenate(y) if len(y) > 1 else y[0] for y in zip(*outs))
    bias_type = w.dtype if bias is None else bias.dtype
    dw, db = way.whole(carry)
    return [losses, dx, dw.astype(w.dtype), db.astype(bias_type)]


def _chosen(form, wants, x, w, bias, share, labels, d):
    """By chunks on one device, all rows at once in a program for several."""
    arrays = [a for a in (w, bias, x, share, labels, d) if a is not None]

    def by(size, way=ByLogits):
        def run(w, *others):
            bias, *rows = others if len(others) > 4 else (None, *others)
            return _by_chunks(way(form, wants, w, bias), size, w, bias, *rows)

        return run

    cpu, other, tiled = _sizes(x)
    tpu = by(other) if softmax_tiles.refuses(x, w, form.cap) else by(tiled, softmax_tiles.ByTiles)
    return at_lowering(*arrays, default=by(max(len(x), 1)), cpu=by(cpu), cuda=by(other), tpu=tpu)


def _sizes(x):
    """Rows of a chunk: on CPUs, elsewhere, and by the kernel for TPUs (a power of two)."""
    least, most = (min(max(times * x.shape[1], LEAST), MOST) for times in CHUNKS)
    return least, most, 1 << (min(max(4 * x.shape[1], 1024), MOST) - 1).bit_length()


def _formulation(site):
    (x, w), form = site.in_avals[:2], dict(site.params["static"])["form"]
    cpu, other, tiled = (f"chunks of {n} rows" for n in _sizes(x))
    why = softmax_tiles.refuses(x, w, form.cap)
    tpu = f"{other} ({why})" if why else f"{tiled}, by a Pallas kernel"
    if site.platform is None:
        return cpu if cpu == other else f"{cpu} on CPUs, else {other}"
    return {"cpu": cpu, "tpu": tpu}.get(site.platform, other)


def _summed(x, w, bias, share, labels, *, form, wanted):
    wants = wanted or (False,) * 3
    losses, *dins = _chosen(form, wants, x, w, bias, share, labels, share)
    total = jnp.sum(losses)
    return total if wanted is None else (total, losses, *dins)


def _summed_backward(dy, share, losses, dx, dw, db, *, wanted):
    return [*(dy * d.astype(dy.dtype) for d in (dx, dw, db)), _of_share(dy, losses, share), None]


def _of_share(dy, losses, share):
    """Cotangent of the rows' shares, whose losses are given times them; 0 of what is not read."""
    divisor = jnp.where(share == 0, 1, share).astype(losses.dtype)
    return jnp.where(share == 0, 0, dy * losses / divisor)


def _each(x, w, bias, share, labels, *, form):
    return _chosen(form, (False,) * 3, x, w, bias, share, labels, share)[0]


def _each_backward(dy, x, w, bias, share, labels, *, form, wanted):
    d = dy * share.astype(dy.dtype)
    losses, *dins = _chosen(form, wanted, x, w, bias, share, labels, d)
    return [*dins, _of_share(dy, losses, share), None]


MATH = """z = x w + bias, λ = log Σ exp z;  z̄ = ℓ̄ (exp(z − λ)(1 + 2 z_loss λ) − (1 − ε) onehot
    − ε / V), x̄ = z̄ wᵀ, w̄ = xᵀ z̄, bias̄ = Σ z̄."""
cross_entropy = Operation(
    "linear_cross_entropy",
    f"y = Σ share ℓ, ℓ = λ − (1 − ε) z[label] − ε mean z + z_loss λ², {MATH}  Keeps the gradient "
    "itself, for ȳ = 1.",
    lambda *operands, form: jnp.sum(reference(*operands, form=form)), _summed, _summed_backward,
    extras=("losses", "dx", "dw", "db"), formulation=_formulation, weighs=True,
)
cross_entropies = Operation(
    "linear_cross_entropies",
    f"y = share ℓ, ℓ = λ − (1 − ε) z[label] − ε mean z + z_loss λ², {MATH}  Logits are computed "
    "again, by chunks of rows.",
    reference, _each, _each_backward, formulation=_formulation, weighs=True,
)
register(*cross_entropy.rules, *cross_entropies.rules)


def _check(x, w, labels, bias, weights, label_smoothing, soft_cap, reduction):
    name = "linear_cross_entropy"
    if w.ndim != 2 or x.shape[-1:] != w.shape[:1] or w.dtype != x.dtype or (
            not jnp.issubdtype(x.dtype, jnp.floating)):
        raise ValueError(
            f"{name} multiplies x [..., D] by w [D, V] of the same floating dtype, got "
            f"{x.dtype.name}{list(x.shape)} and {w.dtype.name}{list(w.shape)}: transpose or cast w."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{name} takes class numbers, got labels of dtype {labels.dtype.name} expected "
            "integers: take the argmax of one-hot labels."
        )
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"{name} takes one label per row of x, got labels of shape {labels.shape} expected "
            f"{x.shape[:-1]}."
        )
    for what, array, shape in (("bias", bias, w.shape[1:]), ("weights", weights, labels.shape)):
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(
                f"{what} of {name} has shape {jnp.shape(array)}, expected {shape} for x of shape "
                f"{x.shape} and w of shape {w.shape}."
            )
    check_smoothing(label_smoothing)
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap bounds logits, got {soft_cap} expected a number above 0.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"reduction is 'mean', 'sum' or 'none', got {reduction!r}."
        )
