"""What the loops of a TPU's program move: its compiler counts the body of each once.

Neither does it say how often a loop runs; that stands in the loop's condition. Bytes are those of
whole tiles, as a TPU lays arrays out. Of an array of which a fusion reads or replaces a slice, the
slice is counted, as the compiler does; in a loop over time the whole would be T times too much.
"""

from __future__ import annotations

import functools
import math
import re

from benchmarks.targets import kernels

_BEGIN = re.compile(r"^%?([\w.\-]+) \(.*\{\s*$")
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"([a-z]+[0-9]*\w*)\[([0-9,]*)\]\{([0-9,]*):T\(([0-9,]*)\)")
_SLICES = ("dynamic-slice", "slice", "gather")


def with_trips(text: str) -> str:
    """The text with how often loops run, where that is not said but stands in their condition.

    A `jax.lax.scan` counts from 0 to the one constant there is.
    """
    constants, inside = {}, None
    for line in text.splitlines():
        if found := _BEGIN.match(line):
            inside = constants.setdefault(found[1], [])
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (found := _CONSTANT.search(line)):
            inside.append(found[1])

    def said(match):
        numbers = constants.get(match[1], [])
        if "known_trip_count" in match[0] or len(numbers) != 1:
            return match[0]
        return f'{match[0]}, backend_config={{"known_trip_count":{{"n":"{numbers[0]}"}}}}'

    return re.sub(r"^.* while\(.*condition=%?([\w.\-]+).*$", said, text, flags=re.MULTILINE)


def repeated_bytes(text: str) -> int:
    """Bytes read and written by all runs of loops but their first, of a program as `with_trips`."""
    program = _Program(text)
    return program.moved(program.entry) - program.moved(program.entry, once=True)


class _Program:
    def __init__(self, text):
        self.computations, self.entry = kernels.parse(_in_tiles(text))
        self.moved = functools.cache(self._moved)  # the program's own, dropped with it

    def _moved(self, name, once=False):
        """Bytes of a computation; ``once``: each loop's body is taken once."""
        inside = {i.name: i for i in self.computations[name]}
        return sum(self._of(i, inside, once) for i in self.computations[name])

    def _of(self, i, inside, once):
        if i.opcode in kernels.FREE or i.opcode.endswith(("-start", "-done")):
            return 0
        if i.opcode == "while":
            names = kernels.called(i, "body") + kernels.called(i, "condition")
            return (1 if once else kernels.trips(i)) * sum(self.moved(n, once) for n in names)
        if i.opcode == "call":
            return sum(self.moved(n, once) for n in kernels.called(i, "to_apply"))
        if i.opcode == "conditional":
            return max(self.moved(n, once) for n in kernels.branches(i))
        if i.opcode in ("fusion", *_SLICES, "dynamic-update-slice"):
            operands = dict.fromkeys(i.operands)
            return self._written(i, inside) + sum(self._read(i, o, inside) for o in operands)
        return i.bytes + sum(inside[o].bytes for o in i.operands if o in inside)

    def _read(self, i, name, inside):
        """Bytes that an instruction reads of one of its operands."""
        whole, first = inside[name].bytes, i.operands.index(name) == 0
        if i.opcode in _SLICES and first:
            return i.bytes
        if i.opcode == "dynamic-update-slice" and first:
            return 0  # what is not replaced stays where it is
        if i.opcode == "bitcast":
            return self._read_of(i.name, inside)
        if i.opcode != "fusion":
            return whole
        within = {j.name: j for j in self.computations[kernels.called(i, "calls")[0]]}
        numbers = {k for k, o in enumerate(i.operands) if o == name}
        parameters = (j for j in within.values() if j.number in numbers)
        return min(whole, sum(self._read_of(p.name, within) for p in parameters))

    def _read_of(self, name, inside):
        """Bytes that all of a computation's instructions read of one value."""
        users = (i for i in inside.values() if name in i.operands)
        return min(inside[name].bytes, sum(self._read(i, name, inside) for i in users))

    def _written(self, i, inside):
        """Bytes that an instruction writes."""
        if i.opcode == "dynamic-update-slice":
            return inside[i.operands[1]].bytes
        if i.opcode == "tuple":
            return sum(self._written(inside[o], inside) for o in i.operands)
        if i.opcode == "bitcast" and inside[i.operands[0]].opcode != "parameter":
            return self._written(inside[i.operands[0]], inside)
        if i.opcode != "fusion":
            return i.bytes
        within = {j.name: j for j in self.computations[kernels.called(i, "calls")[0]]}
        return self._written([*within.values()][-1], within)  # its root is the last


def _in_tiles(text):
    """The text with arrays as large as the tiles that they fill."""
    return _ARRAY.sub(_tiled, text)


def _tiled(match):
    dtype, *numbers = match[1], *(
        [int(n) for n in each.split(",") if n] for each in (match[2], match[3], match[4])
    )
    shape, order, tile = numbers
    if len(order) == len(shape):
        for d, t in zip(order, reversed(tile)):
            shape[d] = math.ceil(shape[d] / t) * t
    return f"{dtype}[{','.join(map(str, shape))}]{{{match[3]}:T({match[4]})"
