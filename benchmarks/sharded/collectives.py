"""What devices send each other in an optimised XLA program."""

from __future__ import annotations

import re
from collections import Counter

from benchmarks.targets import kernels

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INNER = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)")


def collectives(text: str) -> tuple[Counter, Counter]:
    """By kind, how many run, and the bytes that they result in on a device, in one run.

    Args:
      text: of a compiled program, ``compiled.as_text()``. A loop counts as often as it runs, a
        collective that is started and finished apart once.
    """
    computations, entry = kernels.parse(text)
    count, sizes = Counter(), Counter()

    def look(name, times):
        for i in computations[name]:
            kind = i.opcode.removesuffix("-done")
            if kind in COLLECTIVES:
                count[kind] += times
                sizes[kind] += times * i.bytes
            elif i.opcode in ("while", "call", "async-start", "fusion"):
                for inner in _INNER.findall(i.rest):
                    look(inner, times * kernels.trips(i))

    look(entry, 1)
    return count, sizes
