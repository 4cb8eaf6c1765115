"""What a program for one NVIDIA GPU keeps between the sweeps: a minimum cut of a plan's values.

Here the compiler fuses arithmetic into what reads it, so that the question is which arrays are
written and read, and a way of any length is as good as a short one. By `python -m benchmarks
--target h100`, temporary memory / bytes moved / kernels as ratios to `jax.grad`, with the
thresholds of `fbprop.core.recompute` and with the cut: ``resnet50_step`` 0.99 / 0.97 / 0.92 and
0.76 / 0.94 / 0.92, ``gpt2_124m_step`` B16 0.61 / 0.87 / 1.06 and 0.56 / 0.87 / 1.24, ``vit_step``
0.74 / 1.01 / 1.06 and 0.82 / 0.99 / 1.00. Loops, of which nothing is at hand in the other sweep,
go by the thresholds: ``lstm_character_step`` takes 0.68 / 0.42 / 0.78 by a cut, 0.74 / 0.47 / 0.70
by them, and they are the same on every platform.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from fbprop.core import jaxcompat as jc
from fbprop.core.mincut import cut
from fbprop.core.recompute import CHEAP, FEWEST, SMALLEST, computes, is_made_of, runs_as_it_stands

# Any arithmetic on elements fuses, exponentials too. What an operation computes is kept: batch
# norm's y made again moves more bytes in the row ``resnet_network`` than where it is kept.
FUSES = CHEAP - {"made_of"} | {
    "cbrt", "cos", "erf", "erfc", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow",
    "rsqrt", "sin", "sqrt", "tan", "tanh"}
# Whose backward pass reads arrays, where others are fused into what makes what they read.
READS_WHOLE = frozenset((
    "cond", "conv_general_dilated", "dot_general", "gather", "ragged_dot_general", "reduce_window",
    "reduce_window_max", "reduce_window_sum", "scan", "scatter", "scatter-add",
    "select_and_scatter_add", "sort", "while",
))
# Tenths of what it costs to store a value that is an array anyway.
ARRAY = 10
FUSED = 20  # one that no array need be otherwise
INPUT = 5  # it exists; it is read once more
# To make an array again for what reads it whole. Of exponentials XLA makes an array by itself for
# that: with 9 ``vit_b_step`` takes 0.60 of the memory and moves 1.04, so 0.72 and 0.97.
AGAIN, AGAIN_DEAR = 9, 15


class Kept(NamedTuple):
    """The variables that are kept, and ``{variable: equation}`` for those made again from these."""

    stored: tuple
    made: dict


def by_cut(body, steps, keep: Collection, at_hand: Collection) -> Kept:
    """What is kept, of a function whose two sweeps are compiled as one; see `recompute.split`."""
    makers, whole, alone = _makers(body, steps), _read_whole(body, steps), _only_fused(body, steps)
    there = set(at_hand)

    def operands(v):
        return None if v not in makers else [u for u in makers[v].invars if jc.is_var(u)]

    def to_store(v):
        size = jc.nbytes(v.aval)
        if v in there:
            return INPUT * size
        return 0 if size < SMALLEST else (FUSED if v in alone else ARRAY) * size

    def to_make(v):
        size = jc.nbytes(v.aval)
        if v not in whole or size < SMALLEST:
            return 0
        return (AGAIN if is_made_of(makers[v], CHEAP) else AGAIN_DEAR) * size

    while True:
        stored, again = cut(keep, operands, to_store, to_make)
        made = {v: makers[v] for v in again}
        sizes = {v: jc.nbytes(v.aval) for v in keep if v in made and computes(made[v])}
        largest = max(sizes.values(), default=0)
        if sum(sizes.values()) >= FEWEST * largest:
            return Kept(tuple(stored), made)
        for v in sizes:
            if sizes[v] == largest:
                makers.pop(v)


def _fuses(eqn, found):
    return is_made_of(eqn, FUSES) and runs_as_it_stands(found)


def _makers(body, steps):
    """``{variable: equation}`` of results that can be computed again by arithmetic that fuses."""
    return {
        v: eqn for eqn, found in zip(body.eqns, steps) if _fuses(eqn, found) for v in eqn.outvars
    }


def _only_fused(body, steps):
    """Results that nothing but what fuses reads in the forward sweep: no arrays need be there."""
    read = {v for eqn, found in zip(body.eqns, steps) if not _fuses(eqn, found)
            for v in eqn.invars if jc.is_var(v)}
    return {v for eqn, found in zip(body.eqns, steps) if _fuses(eqn, found)
            for v in eqn.outvars} - read


def _read_whole(body, steps):
    """Values that backward passes read which do not fuse."""
    return {
        atom
        for eqn, found in zip(body.eqns, steps) if found and eqn.primitive.name in READS_WHOLE
        for i in found[2].keep
        if jc.is_var(atom := (*eqn.invars, *eqn.outvars)[i])
    }
