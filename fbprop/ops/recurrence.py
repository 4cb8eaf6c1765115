"""The two sweeps over time that recurrent operations share, in columns: a state is [H, B].

Forward, a step at a time: a product of what comes in, one of what goes on, and the cell. Backward,
the cell and the product that goes on are undone a step at a time; what adds up over steps (the
weights' and biases' cotangents) and what none waits for (x̄) is made of a chunk of steps at once.

Columns, since Uᵀ h of a thin h [512, 16] takes 0.6 of the time of h U on a CPU, and the gates of a
cell lie one behind the other (`python -m benchmarks --only ops_lstm,ops_gru,ops_rnn`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from fbprop.core.devices import at_lowering
from fbprop.core.jaxcompat import varying_like
from fbprop.core.precision import at_least_float32, wide_dtype
from fbprop.rules.sweep import chunk_size, in_chunks


class Cell(NamedTuple):
    """What happens in one step, of columns, in float32 at least.

    Attributes:
      step: ``(from_x, from_h, state) -> (state, gates)``; the first of the state is the output.
      undo: ``(dstate, gates, before, after) -> (from_x̄, from_h̄, dstate)``, with the state before
        the step and the output after it; of dstate the first lacks what from_h̄ gives.
    """

    step: object
    undo: object


class Weights(NamedTuple):
    """[D, n H], [H, n H], [n H] or None, [n H] or None."""

    kernel: object
    recurrent: object
    bias: object
    recurrent_bias: object


def _product(a, b, *over):
    """Σ over axes of each, in float32 at least."""
    kind = wide_dtype(a.dtype)
    if kind == a.dtype:
        return lax.dot_general(a, b, (over, ((), ())))
    # jaxlib 0.12 compiles a 16-bit product with turned operands for CPUs that does not run
    # ("Unsupported element type for DotThunk").
    return lax.platform_dependent(
        a, b, cpu=lambda a, b: lax.dot_general(a.astype(kind), b.astype(kind), (over, ((), ()))),
        default=lambda a, b: lax.dot_general(a, b, (over, ((), ())), preferred_element_type=kind))


def _counts(lengths, t):
    """Whether a step, or each of several, is real: [1, B] or [K, 1, B]; None where all are."""
    return None if lengths is None else t[..., None, None] < lengths


def _kept_if(real, new, old):
    return new if real is None else [jnp.where(real, n, o) for n, o in zip(new, old)]


def _column(bias, kind):
    return jnp.zeros((), kind) if bias is None else bias.astype(kind)[:, None]


def forward(cell, x, weights, state, lengths, keeps):
    """Outputs [B, T, H]; the last state [B, H] each; kept: gates, and the state but h, [T, H, B].

    Gates are kept in x's type.
    """
    kind = wide_dtype(x.dtype)
    into, on = weights.kernel.T, weights.recurrent.T
    bias, recurrent_bias = (_column(b, kind) for b in weights[2:])

    def step(state, t):
        x_t = lax.dynamic_index_in_dim(x, t, 1, keepdims=False)
        from_x = _product(into, x_t, (1,), (1,)) + bias
        from_h = _product(on, state[0].astype(x.dtype), (1,), (0,)) + recurrent_bias
        new, gates = cell.step(from_x, from_h, state)
        kept = [*(g.astype(x.dtype) for g in gates), *state[1:]] if keeps else []
        real = _counts(lengths, t)
        out = new[0].astype(x.dtype)
        out = out if real is None else jnp.where(real, out, 0)
        return _kept_if(real, new, state), (out, kept)

    times = jnp.arange(x.shape[1], dtype=jnp.int32)
    state, (outs, kept) = lax.scan(step, [at_least_float32(s).T for s in state], times)
    return outs.transpose(2, 0, 1), [s.T for s in state], kept


def backward(cell, dys, x, weights, h, lengths, out, kept, wanted):
    """Cotangents of x, the four `Weights` and the first state; zeros where none is wanted.

    Args:
      dys: of the outputs and of the last state.
      h: the first output [B, H]; out: all; kept: by `forward`.
      wanted: whether x's, and whether the weights'.
    """
    arrays = [*dys, x, *weights[:2], h, out, *kept, *([] if lengths is None else [lengths])]
    n, m = len(dys), len(kept)

    def by(size):
        def run(*arrays):
            dys, (x, kernel, recurrent, h, out), rest = arrays[:n], arrays[n:n + 5], arrays[n + 5:]
            lengths = rest[m] if len(rest) > m else None
            sweep = _Sweep(cell, x, kernel, recurrent, h, lengths, out, wanted)
            return sweep.run(dys, rest[:m], size)

        return run

    T = x.shape[1]
    chunks = by(chunk_size(T) or T)
    # In a program for several devices each chunk's sums would be sent for itself.
    dx, dw, du, db, dbr, *dstate = at_lowering(
        *arrays, default=by(T), cpu=chunks, cuda=chunks, tpu=chunks)
    return dx, Weights(dw, du, db, dbr), dstate


class _Sweep(NamedTuple):
    """A backward run."""

    cell: Cell
    x: object
    kernel: object
    recurrent: object
    h: object
    lengths: object
    out: object
    wanted: tuple

    def run(self, dys, kept, size):
        """x̄, the weights' and biases' cotangents, and the first state's, from the last chunk on."""
        dout, *dstate = dys
        kind, T = wide_dtype(self.x.dtype), self.x.shape[1]
        dstate = [at_least_float32(d).T for d in dstate]
        width = self.recurrent.shape[1]
        sums = [jnp.zeros(s, kind) for s in ((width, self.x.shape[2]), self.recurrent.shape[::-1],
                                             (width,), (width,))]
        carry = dstate, [varying_like(s, dout) for s in sums], jnp.zeros_like(self.x)
        over = jnp.arange(T, dtype=jnp.int32), list(kept)
        chunk = lambda carry, over, size: (self._chunk(carry, dout, *over, size), None)
        carry, _ = in_chunks(chunk, carry, over, T, size, reverse=True)
        dstate, (dw, du, db, dbr), dx = carry
        return [dx, dw.T, du.T, db, dbr, *(d.T for d in dstate)]

    def _chunk(self, carry, dout, times, kept, size):
        dstate, sums, dx = carry
        first, real = times[0], _counts(self.lengths, times)
        before, after = self._outputs(first, size)
        columns = (jnp.swapaxes(a, 1, 2) for a in (self._rows(dout, first, size), before, after))
        dstate, (dfrom_x, dfrom_h) = lax.scan(
            self._step, dstate, (kept, *columns, real), reverse=True)
        if self.wanted[1]:
            x = self._rows(self.x, first, size)
            # What is padded may be nan.
            x = x if real is None else jnp.where(jnp.swapaxes(real, 1, 2), x, 0)
            sums = self._added(sums, dfrom_x, dfrom_h, x, before)
        if self.wanted[0]:
            part = _product(self.kernel, dfrom_x, (1,), (1,)).transpose(2, 1, 0).astype(dx.dtype)
            dx = lax.dynamic_update_slice_in_dim(dx, part, first, 1)
        return dstate, sums, dx

    def _step(self, dstate, now):
        kept, dy, before, after, real = now
        below = [dstate[0] + dy.astype(dstate[0].dtype), *dstate[1:]]
        before, after, *kept = (at_least_float32(a) for a in (before, after, *kept))
        n = len(kept) - len(dstate) + 1
        dfrom_x, dfrom_h, new = self.cell.undo(below, kept[:n], [before, *kept[n:]], after)
        dfrom_x, dfrom_h = (
            (d if real is None else jnp.where(real, d, 0)).astype(self.x.dtype)
            for d in (dfrom_x, dfrom_h))
        new = [new[0] + _product(self.recurrent, dfrom_h, (1,), (0,)), *new[1:]]
        return _kept_if(real, new, dstate), (dfrom_x, dfrom_h)

    def _rows(self, a, first, size):
        """Of [B, T, .] the steps of a chunk, [K, B, .]."""
        return jnp.swapaxes(lax.dynamic_slice_in_dim(a, first, size, 1), 0, 1)

    def _outputs(self, first, size):
        """[K, B, H] before and after each step of a chunk."""
        after = self._rows(self.out, first, size)
        last = lax.dynamic_index_in_dim(self.out, jnp.maximum(first - 1, 0), 1, keepdims=False)
        start = jnp.where(first == 0, self.h.astype(last.dtype), last)
        return jnp.concatenate([start[None], after[:-1]]), after

    def _added(self, sums, dfrom_x, dfrom_h, x, before):
        """Σ over batch and steps of [K, n H, B] and [K, B, .]."""
        of = lambda d, a: _product(d, a, (0, 2), (0, 1))
        biases = (jnp.sum(d, (0, 2), dtype=sums[0].dtype) for d in (dfrom_x, dfrom_h))
        return [s + m for s, m in zip(sums, (of(dfrom_x, x), of(dfrom_h, before), *biases))]
