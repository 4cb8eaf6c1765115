"""What XLA says of a row's two programs, compiled for an accelerator and not run.

Temporary memory is the compiler's own figure. What is moved is its count of "bytes accessed" for
a TPU and what loops move after their first run, which it leaves out (`loops`); for a GPU what the
kernels of the optimised program read and write (`kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.sharding import SingleDeviceSharding

from benchmarks.row import Row
from benchmarks.targets import kernels, loops


@dataclass
class Compiled:
    """What the compiler says of the two programs of a row; index 0 is fbprop, index 1 the other.

    Attributes:
      temp_bytes: temporary memory.
      moved_bytes: that kernels read and write; TPU: the compiler's "bytes accessed", loops as
        often as they run.
      kernels: started in one run, loops counted as often as they run; TPU: fusions and others.
      flops: by the compiler's count, None where it has none.
      seconds: the compiler's estimate, None where it has none.
    """

    row: Row
    against: str
    temp_bytes: tuple
    moved_bytes: tuple
    kernels: tuple
    flops: tuple
    seconds: tuple


def measure(row: Row, ours, theirs, on) -> Compiled:
    """Compile ``row.build(ours)`` and ``row.build(theirs)`` for a device; see `Compiled`."""
    figures = [_figures(row, ad, on) for ad in (ours, theirs)]
    return Compiled(row, "jax", *zip(*figures))


def program(row: Row, ad, on):
    """One of a row's programs, compiled for a device."""
    where = SingleDeviceSharding(on)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                         row.inputs)
    donated = (0,) if row.carries else ()
    jax.clear_caches()
    return jax.jit(row.build(ad), donate_argnums=donated).lower(*types).compile()


def _figures(row, ad, on):
    compiled = program(row, ad, on)
    text = loops.with_trips(compiled.as_text())
    run, told, moved = kernels.count(text), {}, None
    if on.platform == "tpu":
        told = compiled.cost_analysis()
        moved = told["bytes accessed"] + loops.repeated_bytes(text)
    seconds = told.get("optimal_seconds", 0)
    return (
        compiled.memory_analysis().temp_size_in_bytes, run.bytes if moved is None else moved,
        run.kernels, told.get("flops"), seconds if seconds > 1e-6 else None,
    )
