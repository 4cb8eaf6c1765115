"""What XLA says of a row's two programs, compiled for an accelerator and not run.

Temporary memory is the compiler's own figure. What is moved is its count of "bytes accessed" for
a TPU, and what the kernels of the optimised program read and write for a GPU (`kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.sharding import SingleDeviceSharding

from benchmarks.row import Row
from benchmarks.targets import kernels


@dataclass
class Compiled:
    """What the compiler says of the two programs of a row; index 0 is fbprop, index 1 the other.

    Attributes:
      temp_bytes: temporary memory.
      moved_bytes: that kernels read and write; TPU: the compiler's "bytes accessed".
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
    run = kernels.count(compiled.as_text())
    told = compiled.cost_analysis() if on.platform == "tpu" else {}
    seconds = told.get("optimal_seconds", 0)
    return (
        compiled.memory_analysis().temp_size_in_bytes, told.get("bytes accessed", run.bytes),
        run.kernels, told.get("flops"), seconds if seconds > 1e-6 else None,
    )
