"""A smaller program that still disagrees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from .compare import Trial
from .program import Line, Program


def shrunk(trial: Trial, most: int = 200) -> Trial:
    """The smallest found by removing one thing after another, in at most so many tries."""
    kind = sort_of(trial.difference())
    tries = 0
    while tries < most:
        for smaller in smaller_ones(trial):
            tries += 1
            if sort_of(smaller.difference()) == kind:
                trial = smaller
                break
            if tries >= most:
                break
        else:
            break
    return trial


def sort_of(difference: str | None) -> str | None:
    """The sort of a disagreement: shrinking must not wander off to another."""
    return difference and difference[:24].split("[")[0].rstrip("0123456789")


def smaller_ones(trial: Trial) -> Iterator[Trial]:
    """Trials with one thing less."""
    if trial.transform != "plain":
        yield trial._replace(transform="plain")
    if trial.setting != "none":
        yield trial._replace(setting="none")
    for program in smaller_programs(trial.program):
        yield trial._replace(program=program.needed())


def smaller_programs(program: Program) -> Iterator[Program]:
    for i in range(len(program.results)):
        rest = program.results[:i] + program.results[i + 1 :]
        if rest:
            yield replace(program, results=rest)
    for i, line in enumerate(program.lines):
        # Each value that is there may stand for the line's.
        others = [n for n in program.inputs if n[0] != "i"] + [e.target for e in program.lines[:i]]
        for other in others:
            yield without(program, i, other)
        for b, block in enumerate(line.blocks):
            for smaller in smaller_programs(block):
                blocks = (*line.blocks[:b], smaller, *line.blocks[b + 1 :])
                yield with_line(program, i, replace(line, blocks=blocks))


def with_line(program: Program, i: int, line: Line) -> Program:
    return replace(program, lines=(*program.lines[:i], line, *program.lines[i + 1 :]))


def without(program: Program, i: int, other: str) -> Program:
    """The program with another value's name in place of a line."""
    gone = program.lines[i].target
    rest = [renamed_line(line, gone, other) for line in program.lines[i + 1 :]]
    results = tuple(renamed(r, gone, other) for r in program.results)
    return replace(program, lines=(*program.lines[:i], *rest), results=results)


def renamed(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, text)


def renamed_line(line: Line, old: str, new: str) -> Line:
    blocks = tuple(
        replace(
            block,
            lines=tuple(renamed_line(inner, old, new) for inner in block.lines),
            results=tuple(renamed(r, old, new) for r in block.results),
        )
        for block in line.blocks
    )
    return replace(line, expression=renamed(line.expression, old, new), blocks=blocks)
