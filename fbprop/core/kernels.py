"""Kernels that others wrote and JAX brings: attention by cuDNN on CUDA, by Pallas on TPUs.

JAX gives each as a function with a derivative. Their two passes are taken apart in what it traces:
the forward pass is one equation there, whose results the backward pass may be given instead.
Tested with jax 0.10.2 and 0.12.0.1, compiled for an H100 and a TPU v5e; called only where a program
is lowered for their platform.
"""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp

from fbprop.core import jaxcompat as jc

FORWARD = ("dot_product_attention_fwd_wrapper", "_splash_attention")  # of cuDNN, of Pallas
LANES = 128
CUDNN_MOST = 128  # features; 256 on Hopper, which JAX learns only from a device that is there


def cudnn_refuses(q, k, v, causal, window) -> str:
    """Why cuDNN does not serve attention of these types, and "" if it does."""
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"cuDNN takes 16-bit numbers, not {q.dtype.name}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or not 0 < q.shape[-1] <= CUDNN_MOST:
        return f"cuDNN takes multiples of 8 to {CUDNN_MOST} features, the same of keys and values"
    if not all(q.shape[:3]) or not k.shape[1]:
        return "nothing to do"
    if window and not (causal and q.shape[1] == k.shape[1]):
        return "cuDNN's window is a causal one"
    return ""


def cudnn_is_here() -> bool:
    """Whether this jaxlib's CUDA plugin with cuDNN is installed; programs may be made without."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def _cudnn(scale, causal, window):
    return functools.partial(
        jax.nn.dot_product_attention, scale=scale, is_causal=causal, implementation="cudnn",
        local_window_size=None if window is None else (window[0], 0),
    )


def cudnn_forward(q, k, v, **form):
    """y [B, T, N, D] and the log-sum-exp [B, N, T]; q [B, T, N, D], k and v [B, S, K, D]."""
    return _forward(_cudnn(**form), q, k, v)


def cudnn_backward(q, k, v, y, lse, dy, **form):
    """Cotangents of q, k, v."""
    return _backward(_cudnn(**form), (q, k, v), (y, lse), dy)


def splash_refuses(q, k, v) -> str:
    """Why JAX's Pallas kernel for TPUs does not serve, and "" if it does."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the Pallas kernel takes float32 and bfloat16, not {q.dtype.name}"
    if not q.size or q.shape[1] % LANES or k.shape[1] % LANES:
        return f"the Pallas kernel takes multiples of {LANES} queries and keys"
    return ""


def _splash(q, k, scale, causal, window):
    """The function of one example, [N, T, D].

    Its kernels read q, k and v as [N, D, T]: features last are padded to 128. B16 T1024 H12 D64 in
    bfloat16, compiled for a v5e, takes none of plain attention's temporary memory so and moves 0.22
    of the bytes, with features last 0.14 and 0.36; of 128 features it makes no difference.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (q.shape[1], k.shape[1])
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    if window is not None:
        mask = mask & splash.LocalMask(shape, window, 0)
    rows, columns = (next(s for s in (512, 256, LANES) if n % s == 0) for n in shape)
    turned = splash.QKVLayout.SEQ_MINOR
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=columns, block_q_dkv=rows,
        block_kv_dkv=columns, block_kv_dkv_compute=columns, block_q_dq=rows, block_kv_dq=columns,
        q_layout=turned, k_layout=turned, v_layout=turned,
    )
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * q.shape[0]), head_shards=1, q_seq_shards=1,
        block_sizes=sizes,
    )
    return lambda q, k, v: kernel((q * scale).astype(q.dtype), k, v)


# One example after the other: a kernel's log-sum-exps are 128 times as wide as they need be, and
# the heads stand first there; of all examples these would be 0.4 of what plain attention takes.
def splash_forward(q, k, v, **form):
    """y [B, T, N, E] and the log-sum-exp [B, N, T]; q [B, T, N, D], k and v [B, S, K, D or E]."""

    def one(x):
        q, k, v = map(_turned, x)
        y, lse = _forward(_splash(q, k, **form), q, k, v)
        return _turned(y), lse

    return jax.lax.map(one, (q, k, v))


def splash_backward(q, k, v, y, lse, dy, **form):
    """Cotangents of q, k, v."""

    def one(x):
        (q, k, v, y, dy), lse = map(_turned, x[:-1]), x[-1]
        return [*map(_turned, _backward(_splash(q, k, **form), (q, k, v), (y, lse), dy))]

    return jax.lax.map(one, (q, k, v, y, dy, lse))


def _turned(x):
    return x.swapaxes(0, 1)


def _forward(function, *args):
    made = jax.make_jaxpr(lambda *xs: jax.vjp(function, *xs)[0])(*args)
    return _evaluated(made, args, None)[1]


def _backward(function, args, known, dy):
    made = jax.make_jaxpr(lambda *xs: jax.vjp(function, *xs[:-1])[1](xs[-1]))(*args, dy)
    return _evaluated(made, (*args, dy), known)[0]


def _evaluated(made, args, known):
    """A jaxpr's results, and those of the forward pass in it, which may be known already."""
    body, passes = jc.open_jaxpr(made), 0
    env = dict(zip((*body.constvars, *body.invars), (*jc.consts_of(made), *args)))
    for eqn in body.eqns:
        values = [env[v] if jc.is_var(v) else v.val for v in eqn.invars]
        name = eqn.params.get("name", eqn.primitive.name)
        passes += name in FORWARD
        outs = known if name in FORWARD and passes == 1 else None
        if outs is None:
            # cuDNN's lowering asks for devices, which a program that only holds `at_lowering` does
            # not know; what it stands for does not.
            bound = eqn.primitive.impl if name.endswith("_wrapper") else None
            outs = bound(*values, **eqn.params) if bound else jc.bind(eqn, values)
        known = outs if name in FORWARD and passes == 1 else known
        env.update(zip(eqn.outvars, outs))
    return [env[v] for v in body.outvars], known
