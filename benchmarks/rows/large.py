"""Models that need several accelerators: GPT-2 XL and one of Llama's shape, whole steps with Adam.

Parameters and moments in float32, all arithmetic in bfloat16; blocks are a `lax.scan`, each
computed again in the backward pass, as anyone would write models of this size. They only exist as
shapes: such rows are compiled and not run.

``data`` and ``model`` are the mesh's axes, the batch is over ``data``, each layer's products are
shared out over ``model``; where ``fully`` is 1, ``data`` splits parameters and moments as well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.row import Row, row
from benchmarks.rows.elementwise import cross_entropy, normalised
from benchmarks.rows.steps import training_step
from fbprop import mesh
from fbprop.mesh.layouts import automatic


def attention(q, k, v):
    """Causal, of (B, T, H, D); softmax in float32."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", shares.astype(v.dtype), v)


def by_head(x, D):
    return x.reshape(*x.shape[:2], -1, D)


def gpt_block(p, x, heads):
    D = x.shape[-1] // heads
    h = normalised(x, p["norm1"]["scale"], p["norm1"]["shift"])
    q, k, v = (by_head(h @ p[name], D) for name in ("query", "key", "value"))
    x = x + attention(q, k, v).reshape(x.shape) @ p["out"]
    h = normalised(x, p["norm2"]["scale"], p["norm2"]["shift"])
    return x + jax.nn.gelu(h @ p["up"]) @ p["down"]


def root_mean_square(x, scale):
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale


def turned(x):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), halves of a head turned together."""
    T, D = x.shape[1], x.shape[3]
    t, i = jnp.arange(T, dtype=jnp.float32), jnp.arange(0, D, 2, dtype=jnp.float32)
    angle = t[:, None] * 10_000.0 ** (-i / D)
    cos, sin = (f(angle)[:, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def llama_block(p, x, heads):
    D = x.shape[-1] // heads
    h = root_mean_square(x, p["norm1"]["scale"])
    q, k, v = (by_head(h @ p[name], D) for name in ("query", "key", "value"))
    x = x + attention(turned(q), turned(k), v).reshape(x.shape) @ p["out"]
    h = root_mean_square(x, p["norm2"]["scale"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def shapes(layers, D, hidden, V, T, llama):
    """All parameters; those of the blocks stacked."""
    def f32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    names = ("scale",) if llama else ("scale", "shift")
    norm = {name: f32(layers, D) for name in names}
    square = {name: f32(layers, D, D) for name in ("query", "key", "value", "out")}
    wide = {name: f32(layers, D, hidden) for name in (("up", "gate") if llama else ("up",))}
    blocks = {**square, **wide, "down": f32(layers, hidden, D), "norm1": norm, "norm2": norm}
    rest = {"head": f32(D, V)} if llama else {"positions": f32(T, D)}
    return {"tokens": f32(V, D), "blocks": blocks, "last": f32(D), **rest}


def layout(llama):
    """Of a product's two kernels the first is split along its outputs, the second its inputs."""
    first, second = P(None, None, "model"), P(None, "model")
    head = {"head": P(None, "model")} if llama else {}
    return mesh.layout({
        "tokens": P("model"), **head, "blocks/out": second, "blocks/down": second,
        "blocks/norm*": P(), "blocks/*": first, "*": P(),
    })


def loss_of(block, heads):
    def loss(params, tokens):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        x = params["tokens"][tokens[:, :-1]]
        x = x + params["positions"] if "positions" in params else x
        one = jax.checkpoint(lambda x, p: (block(p, x, heads), None))
        x, _ = lax.scan(one, x, params["blocks"])
        x = root_mean_square(x, params["last"])
        logits = x @ (params["head"] if "head" in params else params["tokens"].T)
        return cross_entropy(logits.astype(jnp.float32), tokens[:, 1:])

    return loss


def large_step(draw, B, T, data, model, fully, *, layers, D, hidden, heads, V, llama) -> Row:
    params = shapes(layers, D, hidden, V, T, llama)
    tensor = layout(llama) if model > 1 else None
    where = mesh.fully_sharded("data", within=tensor) if fully else tensor
    block = llama_block if llama else gpt_block
    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    one = training_step(loss_of(block, heads), params, [tokens])

    def places(devices):
        over = automatic(Mesh(devices[:data * model].reshape(data, model), ("data", "model")))
        params_at, whole = where.shardings(over, params), NamedSharding(over, P())
        state = params_at, [whole, *jax.tree.leaves(params_at) * 2]
        return (state, (NamedSharding(over, P("data")),), whole), (state, None)

    weights = sum(x.size for x in jax.tree.leaves(params))
    flops = B * T * (6.0 * weights + 12 * layers * T * D)
    return Row(one.build, one.inputs, carries=True, places=places, flops=flops)


def sizes(*batch_and_length):
    """By number of devices: fully sharded, and shared out over two axes."""
    B, T = batch_and_length
    return {n: [(B * n, T, n, 1, 1), (B * n, T, n // 4, 4, 0)] for n in (8, 16)}


GPT2_XL, LLAMA_7B = sizes(2, 1024), sizes(1, 2048)


@row("sharded", accelerator=True, devices=8, full=GPT2_XL[8])
@row("sharded", accelerator=True, devices=16, full=GPT2_XL[16])
def gpt2_xl_step_sharded(draw, B, T, data, model, fully):
    """1.6 billion parameters (Radford et al. 2019); its 25 heads are none of 4 devices' alone."""
    return large_step(draw, B, T, data, model, fully, layers=48, D=1600, hidden=6400, heads=25,
                      V=50304, llama=False)


@row("sharded", accelerator=True, devices=8, full=LLAMA_7B[8])
@row("sharded", accelerator=True, devices=16, full=LLAMA_7B[16])
def llama_7b_step_sharded(draw, B, T, data, model, fully):
    """6.7 billion parameters in the shape of Touvron et al. 2023 (arXiv:2302.13971)."""
    return large_step(draw, B, T, data, model, fully, layers=32, D=4096, hidden=11008, heads=32,
                      V=32000, llama=True)
