"""What devices send each other in an optimised XLA program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from benchmarks.targets import kernels

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BEGIN = re.compile(r"^%?([\w.\-]+) \(.*\{\s*$")
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
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


def with_trips(text: str) -> str:
    """The text with how often loops run, where that is not said but stands in their condition.

    A TPU's compiler leaves it out. A `jax.lax.scan` counts from 0 to the one constant there is.
    """
    constants, inside = {}, None
    for line in text.splitlines():
        if found := _BEGIN.match(line):
            inside = constants.setdefault(found[1], [])
        elif inside is not None and (found := _CONSTANT.search(line)):
            inside.append(found[1])

    def said(match):
        numbers = constants.get(match[1], [])
        if "known_trip_count" in match[0] or len(numbers) != 1:
            return match[0]
        return f'{match[0]}, backend_config={{"known_trip_count":{{"n":"{numbers[0]}"}}}}'

    return re.sub(r"^.* while\(.*condition=%?([\w.\-]+).*$", said, text, flags=re.MULTILINE)
