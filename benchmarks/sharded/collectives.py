"""What devices send each other in an optimised XLA program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from benchmarks.targets import kernels
from benchmarks.targets.loops import with_trips

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CHANNEL = re.compile(r"channel_id=(\d+)|$")
_INNER = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)")


def collectives(text: str) -> tuple[Counter, Counter]:
    """By kind, how many run, and the bytes that they result in on a device, in one run.

    Args:
      text: of a compiled program, ``compiled.as_text()``. A loop counts as often as it runs, a
        collective that is started and finished apart once.
    """
    count, sizes = Counter(), Counter()
    for kind, i, times in each_collective(text):
        count[kind] += times
        sizes[kind] += times * i.bytes
    return count, sizes


def each_collective(text: str) -> Iterator[tuple[str, kernels.Instruction, int]]:
    """Kind, instruction and how often it runs, of every collective in a program.

    One that is started and finished apart has the bytes of its end and the attributes of its start.
    A TPU does one in the midst of several fusions: they have its channel in common.
    """
    computations, entry = kernels.parse(with_trips(text))

    def look(name, times):
        started = {i.name: i for i in computations[name] if i.opcode.endswith("-start")}
        fused = {}
        for i in computations[name]:
            kind = i.opcode.removesuffix("-done")
            if kind in COLLECTIVES:
                start = started.get(i.operands[0]) if kind != i.opcode and i.operands else None
                yield kind, i if start is None else i._replace(rest=start.rest), times
            elif i.opcode in ("while", "call", "async-start", "fusion"):
                for inner in _INNER.findall(i.rest):
                    found = look(inner, times * kernels.trips(i))
                    if i.opcode == "fusion":
                        fused.update({_CHANNEL.findall(each[1].rest)[0]: each for each in found})
                    else:
                        yield from found
        yield from fused.values()

    return look(entry, 1)
