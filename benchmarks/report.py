"""What is printed and written: the table, the geometric means, JSON lines, comparisons."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

from benchmarks.machine import copy_rate, matmul_rate

COLUMNS = (
    ("row", 28), ("size", 27), ("against", 13), ("agree", 8), ("time", 6), ("20%", 6), ("80%", 6),
    ("memory", 7), ("compile", 7), ("ms", 9), ("GFLOP/s", 8), ("peak", 5), ("GB/s", 7), ("copy", 5),
)
LEFT = ("row", "size", "against")
FLOOR = 1 << 12  # bytes: memory ratios below it count as this over the other, in means


def record(measurement, kind: str, source: dict) -> dict:
    """One measurement as a line of a results file; see benchmarks/README.md for the fields."""
    row, (ours, theirs) = measurement.row, measurement.seconds
    leaves = jax.tree.leaves(row.inputs)
    seconds = float(np.median(ours))
    dtype = str(max(leaves, key=lambda x: x.nbytes).dtype)
    return {
        "row": row.name, "size": row.size, "kind": kind, "against": measurement.against,
        "agreement": measurement.agreement,
        "time_ratio": measurement.time_ratio(),
        "seconds": [seconds, float(np.median(theirs))],
        "samples": len(ours),
        "memory_ratio": measurement.memory_ratio(),
        "temp_bytes": measurement.temp_bytes,
        "compile_ratio": measurement.compile_ratio(),
        "compile_seconds": [float(np.median(s)) for s in measurement.compile_seconds if s],
        **_rates(row, seconds, dtype),
        "dtype": dtype,
        "shapes": sorted({"x".join(map(str, x.shape)) or "scalar" for x in leaves}),
        **source,
    }


def _rates(row, seconds, dtype):
    if not np.issubdtype(dtype, np.floating) and dtype != "bfloat16":
        dtype = "float32"
    rates = {}
    if row.flops:
        rate = row.flops / seconds
        rates |= {"gflops": rate / 1e9, "share_of_matmul": rate / matmul_rate(dtype)}
    if row.bytes:
        rate = row.bytes / seconds
        rates |= {"gbytes": rate / 1e9, "share_of_copy": rate / copy_rate()}
    return rates


def failure(entry, against: str, error: Exception, source: dict) -> dict:
    """A row that could not be measured, as a line of a results file."""
    message = f"{type(error).__name__}: {error}".split("\n")[0]
    return {"row": entry.name, "size": entry.size, "kind": entry.kind, "against": against,
            "error": message, **source}


def header() -> str:
    """Titles of the table's columns."""
    return _line({name: name for name, _ in COLUMNS})


def line(r: dict) -> str:
    """One record as a line of the table."""
    if "error" in r:
        named = {k: r[k] for k in LEFT}
        return f"{_line(named).rstrip()}  FAILED {r['error']}"
    low, middle, high = r["time_ratio"]
    compiled = r["compile_ratio"]
    return _line({
        "row": r["row"], "size": r["size"], "against": r["against"],
        "agree": _number(r["agreement"], "8.0e"),
        "time": f"{middle:.3f}", "20%": f"{low:.3f}", "80%": f"{high:.3f}",
        "memory": _number(r["memory_ratio"], ".3f"), "compile": _number(compiled, ".2f"),
        "ms": f"{r['seconds'][0] * 1e3:.3f}",
        "GFLOP/s": _number(r.get("gflops"), ".1f"),
        "peak": _number(r.get("share_of_matmul"), ".0%"),
        "GB/s": _number(r.get("gbytes"), ".1f"), "copy": _number(r.get("share_of_copy"), ".0%"),
    })


def _number(value, form):
    return "-" if value is None else format(value, form)


def _line(cells):
    return " ".join(
        f"{cells.get(name, ''):{'<' if name in LEFT else '>'}{width}}" for name, width in COLUMNS
    )


def means(records: list[dict]) -> list[str]:
    """Geometric means of the ratios and the worst of each, per kind of row and per rival."""
    groups = defaultdict(list)
    for r in records:
        if "error" not in r:
            groups[f"{r['kind']} rows against {r['against']}"].append(r)
    return [f"{name} ({len(group)}): {_mean(group)}" for name, group in sorted(groups.items())]


def _mean(group):
    ratios = {
        "time": [r["time_ratio"][1] for r in group],
        "memory": [_floored(r["temp_bytes"]) for r in group if r["temp_bytes"]],
        "compile": [r["compile_ratio"] for r in group if r["compile_ratio"]],
    }
    parts = [
        f"{name} {math.exp(np.mean(np.log(values))):.3f} (worst {max(values):.3f})"
        for name, values in ratios.items() if values
    ]
    return "geometric mean " + ", ".join(parts)


def _floored(temp_bytes):
    ours, theirs = (max(b, FLOOR) for b in temp_bytes)
    return ours / theirs


class Progress:
    """What is being measured, on standard error; one line that is rewritten on a terminal."""

    def __init__(self, total: int, stream=None):
        self._total, self._done, self._stream = total, 0, stream or sys.stderr
        self._terminal = self._stream.isatty()

    def start(self, entry):
        self._done += 1
        self._show(f"[{self._done}/{self._total}] {entry.name} {entry.size}")

    def clear(self):
        if self._terminal:
            self._show("")

    def _show(self, text):
        end = "" if self._terminal else "\n"
        self._stream.write((f"\r\x1b[K{text}" if self._terminal else text) + end)
        self._stream.flush()


def read(path) -> list[dict]:
    """The records of a results file."""
    return [json.loads(text) for text in Path(path).read_text().splitlines() if text.strip()]


def compare(before: list[dict], after: list[dict]) -> list[str]:
    """What moved between two results files: rows whose 20-80% intervals do not overlap.

    Largest change first; then memory that changed, failures, and rows in one file only.
    """
    old, new = ({_key(r): r for r in records} for records in (before, after))
    lines = [f"{' '.join(k)}: only in the {'first' if k in old else 'second'} file"
             for k in sorted(old.keys() ^ new.keys())]
    moved = []
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        if "error" in a or "error" in b:
            lines += [f"{' '.join(key)}: {_state(a)} -> {_state(b)}"] * (_state(a) != _state(b))
        else:
            moved += [(abs(math.log(c)), f"{' '.join(key)}: {text}") for text, c in _changes(a, b)]
    lines = [text for _, text in sorted(moved, reverse=True)] + sorted(lines)
    return lines or ["nothing moved"]


def _key(r):
    return r["row"], r["size"], r["against"]


def _state(r):
    return r.get("error", "measured")


def _changes(a, b):
    (low, middle, high), (low_b, middle_b, high_b) = a["time_ratio"], b["time_ratio"]
    if low_b > high or high_b < low:
        yield f"time ratio {middle:.3f} -> {middle_b:.3f}", middle_b / middle
    if a["temp_bytes"] and b["temp_bytes"]:
        old, new = _floored(a["temp_bytes"]), _floored(b["temp_bytes"])
        if abs(math.log(new / old)) > 0.01:
            yield f"memory ratio {old:.3f} -> {new:.3f}", new / old


def markdown(records: list[dict], only: str = "") -> list[str]:
    """The records as a Markdown table, for the README.

    Args:
      only: parts of names of rows, separated by commas; all rows by default.
    """
    records = [r for r in records if any(p in r["row"] for p in only.split(","))]
    lines = ["| row | size | against | time | temporary memory |", "|---|---|---|---|---|"]
    for r in records:
        if "error" not in r:
            memory = _number(r["memory_ratio"], ".2f")
            cells = r["row"], r["size"], r["against"], f"{r['time_ratio'][1]:.2f}", memory
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *means(records)]
