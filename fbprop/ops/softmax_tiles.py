"""Softmax of x w by tiles of the vocabulary: a Pallas kernel for TPUs, and what is made of it.

XLA writes the logits of a chunk in float32 and reads them three times: for the sum of exponentials,
for x̄ and for w̄. The kernel writes the exponentials alone, in bfloat16 and each tile's relative to
its own maximum, as they leave the product; x̄ and w̄ read these, times a factor per row and tile.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LANES = 128
COLUMNS = 512
ROWS = 1024, 512, 256, 128  # of a tile: the most whose operands, there twice, fit in ROOM
ROOM = 6 << 20  # of 16 MiB of VMEM; logits and exponentials of a tile are the rest
PRODUCTS = None, "default", "fastest", "bfloat16"  # precisions that mean one pass of bfloat16


def refuses(x, w, cap) -> str:
    """Why the kernel does not serve, and "" if it does."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the Pallas kernel takes float32 and bfloat16, not {x.dtype.name}"
    if cap is not None:
        return "soft_cap's slope needs the logits"
    if jax.config.jax_default_matmul_precision not in PRODUCTS:
        return "products are to be more exact than the Pallas kernel's, of bfloat16"
    if not x.size or w.shape[1] < COLUMNS:
        return f"the Pallas kernel takes {COLUMNS} classes or more"
    return "" if _rows(x.shape[1]) else f"{x.shape[1]} features do not fit in the Pallas kernel"


def _rows(d):
    return next((n for n in ROWS if 4 * d * (n + COLUMNS) <= ROOM), 0)


class Tiles(NamedTuple):
    """Of R rows and T tiles: exponentials [T, R, COLUMNS], and of each tile numbers [R, T].

    Attributes:
      e: exp(z - top), bfloat16, 0 beyond the vocabulary; None if not asked for.
      top: maxima.   total: sums of the exponentials.   target: sums of z times the target.
    """

    e: jax.Array | None
    top: jax.Array
    total: jax.Array
    target: jax.Array


def tiles_of(x, w, bias, labels, classes, smoothing, keep, interpret=False) -> Tiles:
    """Of x [R, D] and w [T · COLUMNS, D], bfloat16, bias [1, T · COLUMNS] or None, labels [R]."""
    from jax.experimental import pallas as pl

    (n, d), count = x.shape, w.shape[0] // COLUMNS
    rows = min(_rows(d), math.ceil(n / LANES) * LANES)
    zero = np.int32(0)  # an int is int64 under `jax_enable_x64`, which kernels do not take
    of_rows, of_columns = (lambda i, t: (i, zero)), (lambda i, t: (t, zero))
    specs = [pl.BlockSpec((rows, d), of_rows), pl.BlockSpec((rows, 1), of_rows),
             pl.BlockSpec((COLUMNS, d), of_columns)]
    arrays = [x, labels[:, None], w]
    if bias is not None:
        specs.append(pl.BlockSpec((1, COLUMNS), lambda i, t: (zero, t)))
        arrays.append(bias)
    # A tile's numbers are a lane of a block that stays while its 128 tiles come by.
    outs = [jax.ShapeDtypeStruct((n, math.ceil(count / LANES) * LANES), jnp.float32)] * 3
    blocks = [pl.BlockSpec((rows, LANES), lambda i, t: (i, lax.div(t, np.int32(LANES))))] * 3
    if keep:
        outs.append(jax.ShapeDtypeStruct((count, n, COLUMNS), jnp.bfloat16))
        blocks.append(pl.BlockSpec((None, rows, COLUMNS), lambda i, t: (t, i, zero)))
    kernel = functools.partial(_kernel, classes, smoothing, bias is not None)
    outs = pl.pallas_call(kernel, grid=(math.ceil(n / rows), count), in_specs=specs,
                          out_specs=blocks, out_shape=outs, interpret=interpret)(*arrays)
    return Tiles(outs[3] if keep else None, *(a[:, :count] for a in outs[:3]))


def _kernel(classes, smoothing, biased, x, labels, w, *rest):
    from jax.experimental import pallas as pl

    t, (top, total, target, *e) = pl.program_id(1), rest[biased:]
    z = lax.dot_general(x[...], w[...], (((1,), (1,)), ((), ())),
                        precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
    z = z + rest[0][...] if biased else z
    column = t * COLUMNS + lax.broadcasted_iota(jnp.int32, z.shape, 1)
    real = column < classes
    most = jnp.max(jnp.where(real, z, -jnp.inf), -1, keepdims=True)
    # Where all are -inf their exponentials are 0.
    powers = jnp.where(real, jnp.exp(z - jnp.where(most == -jnp.inf, 0.0, most)), 0.0)
    aims = jnp.sum(jnp.where(column == labels[...], (1 - smoothing) * z, 0.0), -1, keepdims=True)
    if smoothing:
        aims += smoothing / classes * jnp.sum(jnp.where(real, z, 0.0), -1, keepdims=True)
    lane = lax.broadcasted_iota(jnp.int32, top.shape, 1) == lax.rem(t, np.int32(LANES))
    for out, value in ((top, most), (total, jnp.sum(powers, -1, keepdims=True)), (target, aims)):
        out[...] = jnp.where(lane, value, out[...])
    for out in e:
        out[...] = powers.astype(out.dtype)


class ByTiles:
    """How a chunk of rows is done, as `fbprop.ops.linear_cross_entropy.ByLogits`, by the kernel.

    w is turned and padded once, and w̄ [T, COLUMNS, D] turned back at the end.
    """

    def __init__(self, form, wants, w, bias, interpret=False):
        self.form, self.wants, self.classes, self.interpret = form, wants, w.shape[1], interpret
        pad = -w.shape[1] % COLUMNS
        self.w = jnp.pad(w.astype(jnp.bfloat16).T, ((0, pad), (0, 0)))
        self.bias = None if bias is None else jnp.pad(bias.astype(jnp.float32), (0, pad))[None]
        shape = self.w.shape[0] // COLUMNS, COLUMNS
        self.carry = (jnp.zeros((*shape, len(w)) if wants[1] else (0,), jnp.float32),
                      jnp.zeros(shape if wants[2] else (0,), jnp.float32))

    def chunk(self, carry, x, labels, d):
        """A chunk's losses and x̄, and the carry with what it adds to w̄ and bias̄."""
        (dw, db), narrow = carry, x.astype(jnp.bfloat16)
        losses, g = self._rows(narrow, labels, d)
        product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        if self.wants[1]:
            dw = dw + product(g, narrow, (((1,), (0,)), ((), ())))
        if self.wants[2]:
            db = db + jnp.sum(g, 1, dtype=jnp.float32)
        dx = jnp.zeros((len(x), 0), x.dtype)
        if self.wants[0]:
            w = self.w.reshape(len(g), COLUMNS, -1)
            dx = product(g, w, (((0, 2), (0, 1)), ((), ()))).astype(x.dtype)
        return (dw, db), (losses, dx)

    def whole(self, carry):
        """w̄ and bias̄."""
        dw, db = carry
        if self.wants[1]:
            dw = dw.reshape(-1, dw.shape[-1])[:self.classes].T
        return dw, db.reshape(-1)[:self.classes]

    def _rows(self, x, labels, d):
        form, keep = self.form, any(self.wants)
        tiles = tiles_of(x, self.w, self.bias, labels, self.classes, form.smoothing, keep,
                         self.interpret)
        top = jnp.max(tiles.top, -1, keepdims=True)
        parts = jnp.exp(tiles.top - top)
        total = jnp.sum(parts * tiles.total, -1, keepdims=True)
        lse = top + jnp.log(total)
        losses = lse[:, 0] - jnp.sum(tiles.target, -1) + form.z_loss * lse[:, 0] ** 2
        if not keep:
            return losses, None
        factor = parts * (d[:, None] * (1 + 2 * form.z_loss * lse) / total)
        g = tiles.e.astype(factor.dtype) * factor.T[:, :, None]
        g = g - self._targets(g.shape, labels, d)
        return losses, g.astype(jnp.bfloat16)

    def _targets(self, shape, labels, d):
        """(1 − ε) d on a row's label and ε d / V on every class, [T, R, COLUMNS]."""
        smoothing, d = self.form.smoothing, d[None, :, None]
        columns = COLUMNS * lax.broadcasted_iota(jnp.int32, shape, 0)
        columns = columns + lax.broadcasted_iota(jnp.int32, shape, 2)
        targets = jnp.where(columns == labels[None, :, None], (1 - smoothing) * d, 0.0)
        if smoothing:
            targets = targets + jnp.where(columns < self.classes, smoothing / self.classes * d, 0.0)
        return targets
