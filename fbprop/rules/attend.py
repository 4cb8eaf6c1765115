"""Attention as an operation, and which way it is computed where.

* One CPU: one head after the other, by blocks of queries (`fbprop.rules.heads.by_heads`).
* One CUDA device: cuDNN, where it serves (`refused`).
* One TPU: the Pallas kernel that comes with JAX, where it serves.
* Everything else, and a program for several devices: by blocks of queries, all heads at once.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from fbprop.core import kernels
from fbprop.core.devices import at_lowering
from fbprop.core.operation import Operation
from fbprop.core.precision import wide_dtype
from fbprop.core.rule import Rule, Step
from fbprop.rules import attention as portable
from fbprop.rules.attention import DIMS, Form, Operands
from fbprop.rules.heads import all_heads, by_heads

# Blocks of queries at most: they are written out one after the other. Compiled for an H100, float32
# and causal, B4 H8 T1024 D64, 1, 2, 4, 8 take 0.71, 0.47, 0.39, 0.43 of plain code's memory and
# move 1.06, 0.88, 0.86, 1.01 of the bytes, in 1.1, 1.8, 3.5, 6 times the kernels. On a CPU, of
# 1,024 queries, 8 blocks take 0.85 of the time forward that 16 do, and 0.95 backward.
BLOCKS, CPU_BLOCKS = 4, 8


def plain(q, k, v, bias=None, mask=None, real=None, seed=None, *, form: Form):
    """In plain code, for short sequences, and to compare with; without dropout."""
    x = Operands(q, k, v, bias, mask, real, seed)
    if real is not None:
        t, s = (portable.count(a.shape[1]) < real[:, :, i] for i, a in ((0, q), (1, k)))
        q = jnp.where(t[..., None, None, None], q, 0)
        k, v = (jnp.where(s[..., None, None], a, 0) for a in (k, v))
    # With all heads in one dimension: XLA turns arrays about that have one more.
    repeated = lambda a: a if q.shape[3] == 1 else jnp.repeat(a, q.shape[3], 2)
    wide = wide_dtype(q.dtype)
    spec = "bthd,bshd->bhts"
    scores = jnp.einsum(spec, _ungrouped_heads(q), repeated(k), preferred_element_type=wide)
    scores = scores * form.scale
    if bias is not None:
        scores = scores + _ungrouped(bias).astype(wide)
    seen = _seen_by_all(form, x)
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.finfo(wide).min)
    shares = jax.nn.softmax(scores)
    if any(a is not None for a in (bias, mask, real, form.window)):
        shares = jnp.where(seen, shares, 0)  # of a query that sees nothing all would be the same
    y = jnp.einsum("bhts,bshe->bthe", shares.astype(v.dtype), repeated(v))
    return y.reshape(*q.shape[:4], v.shape[3])


def _seen_by_all(form, x):
    """Which keys queries see, broadcasts to [B, H, T, S]; None: all."""
    t, s = portable.count(x.q.shape[1])[:, None], portable.count(x.k.shape[1])
    seen = [] if x.mask is None else [_ungrouped(x.mask)]
    if x.bias is not None:  # below what stands for a key that is not seen
        seen.append(~jnp.isneginf(_ungrouped(x.bias)))
    if form.causal:
        seen.append(s <= t)
    if form.window is not None:
        left, right = form.window
        seen += [s >= t - left, s <= t + right]
    if x.real is not None:
        queries, keys = (x.real[:, :, i, None, None] for i in (0, 1))
        seen += [t < queries, s < keys]
    return functools.reduce(jnp.logical_and, seen) if seen else None


def _ungrouped_heads(array):
    """[B, T, K, G, n] as [B, T, H, n]."""
    b, t, k, g, n = array.shape
    return array.reshape(b, t, k * g, n)


def _ungrouped(array):
    """[B, K, T, G, S] as [B, H, T, S]; dimensions may be 1."""
    b, k, t, g, s = array.shape
    return array.swapaxes(2, 3).reshape(b, k * g, t, s)


def refused(form, x, platform) -> str:
    """Why the kernel of a platform does not serve, and "" if it does; x: arrays or types."""
    if form.dropout:
        return "dropout"
    for name in ("bias", "mask", "real"):
        if getattr(x, name) is not None:
            return {"real": "lengths"}.get(name, name)
    q, k, v = _merged(x, jax.eval_shape)
    if platform == "cuda":
        return kernels.cudnn_refuses(q, k, v, form.causal, form.window)
    return kernels.splash_refuses(q, k, v)


def _merged(x, of=lambda f, *args: f(*args)):
    """q with all its heads in one dimension; k and v."""
    return of(_ungrouped_heads, x.q), x.k, x.v


def _forward(q, k, v, bias, mask, real, seed, *, form):
    x = Operands(q, k, v, bias, mask, real, seed)
    (batch, steps, heads, group, _), size = q.shape, v.shape[-1]

    def by_kernel(forward):
        def run(q, k, v):
            y, lse = forward(*_merged(Operands(q, k, v)), **_told(form))
            lse = lse.reshape(batch, heads, group, steps).swapaxes(2, 3)
            return y.reshape(batch, steps, heads, group, size), lse

        return run

    results = [((batch, steps, heads, group, size), (0, 2)), ((batch, heads, steps, group), (0, 1))]
    run = lambda most, _: lambda *one: portable.forward(form, Operands(*one), most)
    ways = map(by_kernel, (kernels.cudnn_forward, kernels.splash_forward))
    return tuple(_chosen(form, x, (), run, results, *ways))


def _backward(dy, q, k, v, bias, mask, real, seed, out, lse, *, form, wanted):
    x = Operands(q, k, v, bias, mask, real, seed)
    bias_wanted = wanted[3]

    def by_kernel(backward):
        def run(q, k, v, y, lse, dy):
            y, dy = map(_ungrouped_heads, (y, dy))
            lse = lse.swapaxes(2, 3).reshape(lse.shape[0], -1, lse.shape[2])
            dq, dk, dv = backward(*_merged(Operands(q, k, v)), y, lse, dy, **_told(form))
            return dq.reshape(q.shape), dk, dv

        return run

    def run(most, keys_first):
        return lambda *one: portable.backward(
            form, Operands(*one[:-3]), *one[-3:], bias_wanted, most, keys_first)

    results = [(a.shape, d) for a, d in zip(x[:4] if bias_wanted else x[:3], DIMS)]
    ways = map(by_kernel, (kernels.cudnn_backward, kernels.splash_backward))
    dins = _chosen(form, x, (out, lse, dy), run, results, *ways)
    return [*dins, *[None] * (7 - len(dins))]


def _chosen(form, x, more, run, results, cudnn, splash):
    """The portable way or a kernel, where a program is lowered; kernels get what is there."""
    arrays, dims = [*x, *more], [*DIMS, (0, 2), (0, 1), (0, 2)]
    there, n = [i for i, a in enumerate(arrays) if a is not None], len(arrays)

    group = x.q.shape[3]
    grouped = [i for i, a in enumerate(arrays) if a is not None and i in (0, 7, 9)]  # q, y, dy

    def by(way, most, keys_first=False):
        def one_head(*arrays):
            apart = [a if i not in grouped else a.reshape(len(a), group, a.shape[1] // group)
                     for i, a in enumerate(arrays)]
            return [y.reshape(len(y), y.shape[1] * y.shape[2]) if _is_grouped(*of) else y
                    for y, of in zip(run(most, keys_first)(*apart), results)]

        def portably(*given):
            at = dict(zip(there, given))
            every = [_flat(at[i]) if i in grouped else at.get(i) for i in range(n)]
            flat = [(_flat_shape(shape, d), d) for shape, d in results]
            outs = way(one_head, every, dims[:n], flat)
            return [y.reshape(shape) for y, (shape, _) in zip(outs, results)]

        return portably

    # From 256 queries on blocks are of 128 or more: 256 take 0.9 of the time that four blocks do.
    most = min(CPU_BLOCKS, max(2, x.q.shape[1] // 128))
    forms = {"cpu": by(by_heads, most, keys_first=True)}
    if not refused(form, x, "cuda") and kernels.cudnn_is_here():
        forms["cuda"] = cudnn
    if not refused(form, x, "tpu"):
        forms["tpu"] = splash
    return at_lowering(*(arrays[i] for i in there), default=by(all_heads, BLOCKS), **forms)


# A group of one head has no dimension of its own in loops: XLA copies what has.
def _flat(array):
    return array.reshape(_flat_shape(array.shape, (0, 2)))


def _flat_shape(shape, dims):
    """[B, T, K, G, n] as [B, T, K, G · n]."""
    return (*shape[:3], shape[3] * shape[4]) if _is_grouped(shape, dims) else shape


def _is_grouped(shape, dims):
    return len(shape) == 5 and dims == (0, 2)


def _told(form):
    return {"scale": form.scale, "causal": form.causal, "window": form.window}


def formulation(site) -> str:
    """For `fbprop.explain`."""
    types = iter(site.in_avals)
    x = Operands(*(next(types) if g else None for g in site.params["given"]))
    return _formulation(dict(site.params["static"])["form"], x, site.platform)


def _formulation(form, x, only):
    """Of every platform, or of the ``only`` one that is asked about."""
    said = ["head by head, " * (only == "cpu") + "by blocks of queries"]
    for platform, device, kernel in (("cuda", "CUDA", "cuDNN"), ("tpu", "TPU", "Pallas")):
        why = refused(form, x, platform)
        if only == platform and not why:
            return kernel
        if only in (None, platform):
            said.append(f"not {kernel}: {why}" if why else f"{kernel} on {device}")
    return "; ".join(said)


attend = Operation(
    "attention",
    "y = softmax(q kᵀ scale + bias) v over the keys that are seen, 0 where none is;  v̄ = Pᵀ ȳ, "
    "S̄ = P (ȳ vᵀ − Σ ȳ y), q̄ = S̄ k scale, k̄ = S̄ᵀ q scale, bias̄ = S̄.  P is made again from the "
    "log-sum-exp, block by block.",
    plain, _forward, _backward, extras=("lse",), formulation=formulation,
)


class DotProductAttention(Rule):
    """JAX's own attention, without bias, mask or lengths, of more than `ROWS` steps."""

    def keeps(self):
        return "q, k, v, y and per query the log-sum-exp of its scores"

    def formulation(self, site):
        types = jax.eval_shape(self._grouped, *site.in_avals)
        return _formulation(self._form(site), Operands(*types), site.platform)

    def _form(self, site):
        scale, causal = site.params["scale"], site.params["is_causal"]
        size = site.in_avals[0].shape[-1]
        return Form(1 / math.sqrt(size) if scale is None else scale, causal)

    def _grouped(self, q, k, v):
        """q with its heads in groups; k and v."""
        b, t, n, d = q.shape
        return q.reshape(b, t, k.shape[2], n // k.shape[2], d), k, v

    def prepare(self, site):
        form, without = self._form(site), (None,) * 4

        def forward(q, k, v):
            y, lse = attend.everything(*self._grouped(q, k, v), *without, form=form)
            return [y.reshape(*q.shape[:3], v.shape[3])], (lse,)

        def backward(kept, extra, douts):
            (q, k, v, y), (lse,), (dy,) = kept, extra, douts
            operands = self._grouped(q, k, v)
            y, dy = (a.reshape(*operands[0].shape[:4], v.shape[3]) for a in (y, dy))
            dq, dk, dv, *_ = _backward(
                dy, *operands, *without, y, lse, form=form, wanted=(True,) * 3 + (False,) * 4)
            return [dq.reshape(q.shape), dk, dv]

        return Step((0, 1, 2, 3), backward, forward)


RULES = [
    *attend.rules,
    DotProductAttention("jax.nn.dot_product_attention", attend.math),
]
