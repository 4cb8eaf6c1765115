"""What an optimised XLA program reads and writes: operands and results of whatever is a kernel.

Read from `compiled.as_text()`. A loop counts as often as it runs, where XLA knows that. A kernel
that reads or writes a part of an array in place is counted with the whole of it, in both programs
of a row alike.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

# Not kernels: names for what is there, and what only says where to go on.
FREE = frozenset((
    "add-dependency", "after-all", "bitcast", "constant", "get-tuple-element", "iota-done",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple",
))
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"([a-z]+[0-9]*\w*)\[([0-9,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Work(NamedTuple):
    """Bytes read and written, and kernels started, in one run."""

    bytes: int = 0
    kernels: int = 0

    def __add__(self, other):
        return Work(self.bytes + other.bytes, self.kernels + other.kernels)

    def times(self, n):
        return Work(self.bytes * n, self.kernels * n)


class Instruction(NamedTuple):
    """One line of a computation: its name, its type's bytes, what it does, to what.

    ``number`` is that of a parameter.
    """

    name: str
    bytes: int
    opcode: str
    operands: tuple[str, ...]
    rest: str
    number: int | None = None


def count(text: str) -> Work:
    """`Work` of one run of a program, from its optimised text."""
    computations, entry = parse(text)
    return _work(entry, computations, {})


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program, by name, and the name of the one that it starts with."""
    computations, entry, inside = {}, None, None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            inside = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (found := _INSTRUCTION.match(line)):
            inside.append(_instruction(found[1], found[2]))
    return computations, entry


def _instruction(name, text):
    kind, rest = _split_type(text)
    opcode, _, rest = rest.partition("(")
    inside, rest = _until_closed(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    number = int(inside) if opcode.strip() == "parameter" else None
    return Instruction(name, _nbytes(kind), opcode.strip(), operands, rest, number)


def _split_type(text):
    """The type in front of an instruction, and what follows."""
    if text.startswith("("):
        inside, rest = _until_closed(text[1:])
        return inside, rest.lstrip()
    kind, _, rest = text.partition(" ")
    return kind, rest


def _until_closed(text):
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _nbytes(kind):
    bits = 0
    for dtype, shape in _ARRAY.findall(kind):
        size = math.prod(int(d) for d in shape.split(",") if d)
        bits += size * _width(dtype)
    return bits // 8


def _width(dtype):
    """Bits of an element: the first number in the name of its type (bf16, s32, f8e4m3, c64)."""
    if dtype in _BITS:
        return _BITS[dtype]
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 0


def _work(name, computations, done):
    if name not in done:
        sizes = {i.name: i.bytes for i in computations[name]}
        done[name] = sum(
            (_of(i, sizes, computations, done) for i in computations[name]), start=Work()
        )
    return done[name]


def trips(i: Instruction) -> int:
    """How often a loop runs; 1 where XLA does not know, and of anything else."""
    found = _TRIPS.search(i.rest)
    return int(found[1]) if found else 1


def called(i: Instruction, key: str) -> list[str]:
    """The computations that an instruction calls as its ``key``: "body", "calls" and so on."""
    return re.findall(rf"{key}=\{{?%?([\w.\-]+)", i.rest)


def branches(i: Instruction) -> list[str]:
    """The computations of which a conditional runs one."""
    names = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
    found = names[1] if names else " ".join(
        re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", i.rest))
    return re.findall(r"[\w.\-]+", found)


def _of(i, sizes, computations, done):
    inner = lambda key: sum((_work(n, computations, done) for n in called(i, key)), start=Work())
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return Work()
    if i.opcode == "while":
        return (inner("body") + inner("condition")).times(trips(i))
    if i.opcode == "call":
        return inner("to_apply")
    if i.opcode == "conditional":
        return max(_work(n, computations, done) for n in branches(i))
    if i.opcode == "async-start" or (i.opcode.endswith("-start") and "calls=" in i.rest):
        return inner("calls")
    return Work(i.bytes + sum(sizes.get(o, 0) for o in i.operands), 1)
