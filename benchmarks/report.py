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
from benchmarks.sharded import report as sharded
from benchmarks.targets import report as compiled

COLUMNS = (
    ("row", 28), ("size", 27), ("against", 13), ("agree", 8), ("time", 6), ("20%", 6), ("80%", 6),
    ("memory", 7), ("compile", 7), ("ms", 9), ("GFLOP/s", 8), ("peak", 5), ("GB/s", 7), ("copy", 5),
)
LEFT = "row", "size", "against"
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


def header(columns=COLUMNS) -> str:
    """Titles of the table's columns."""
    return _line({name: name for name, _ in columns}, columns)


def line(r: dict) -> str:
    """One record as a line of the table."""
    special = _special(r)
    columns, cells = (special.COLUMNS, special.cells) if special else (COLUMNS, _cells)
    if special is sharded and "target" in r:
        columns = sharded.TARGET_COLUMNS
    if "error" in r:
        return f"{_line({k: r[k] for k in LEFT}, columns).rstrip()}  FAILED {r['error']}"
    return _line(cells(r), columns)


def _special(r):
    """What knows the lines of programs that were counted, not timed; None of the others."""
    return sharded if "devices" in r else compiled if "target" in r else None


def _cells(r):
    low, middle, high = r["time_ratio"]
    return {
        "row": r["row"], "size": r["size"], "against": r["against"],
        "agree": _number(r["agreement"], "8.0e"),
        "time": f"{middle:.3f}", "20%": f"{low:.3f}", "80%": f"{high:.3f}",
        "memory": _number(r["memory_ratio"], ".3f"),
        "compile": _number(r["compile_ratio"], ".2f"),
        "ms": f"{r['seconds'][0] * 1e3:.3f}",
        "GFLOP/s": _number(r.get("gflops"), ".1f"),
        "peak": _number(r.get("share_of_matmul"), ".0%"),
        "GB/s": _number(r.get("gbytes"), ".1f"), "copy": _number(r.get("share_of_copy"), ".0%"),
    }


def _number(value, form):
    return "-" if value is None else format(value, form)


def _line(cells, columns):
    return " ".join(
        f"{cells.get(name, ''):{'<' if name in LEFT else '>'}{width}}" for name, width in columns
    )


def means(records: list[dict]) -> list[str]:
    """Geometric means of the ratios and the worst of each, per kind of row and per rival."""
    groups = defaultdict(list)
    for r in records:
        if "error" not in r:
            groups[_group(r)].append(r)
    return [f"{name} ({len(group)}): {_mean(group)}" for name, group in sorted(groups.items())]


def _group(r):
    device = "".join(f" on {r[name]}" for name in ("target", "devices") if name in r)
    return f"{r['kind']} rows against {r['against']}{device}"


def _mean(group):
    found = defaultdict(list)
    for r in group:
        for name, ratio in ratios(r).items():
            found[name].append(ratio)
    parts = [
        f"{name} {math.exp(np.mean(np.log(values))):.3f} (worst {max(values):.3f})"
        for name, values in found.items()
    ]
    return "geometric mean " + ", ".join(parts)


def ratios(r: dict) -> dict[str, float]:
    """fbprop / other of a record, by title of the column; very small figures count as more."""
    if special := _special(r):
        return special.ratios(r)
    found = {"time": r["time_ratio"][1]}
    if r["temp_bytes"]:
        ours, theirs = (max(b, FLOOR) for b in r["temp_bytes"])
        found["memory"] = ours / theirs
    return found | ({"compile": r["compile_ratio"]} if r["compile_ratio"] else {})


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

    Largest change first, memory and whatever else a compiler counts among them; then failures, and
    rows in one file only.
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
    return tuple(str(r[name]) for name in (*LEFT, "target", "devices") if name in r)


def _state(r):
    return r.get("error", "measured")


def _changes(a, b):
    old, new = ratios(a), ratios(b)
    for name in old.keys() & new.keys() - {"compile"}:
        change, moved = new[name] / old[name], abs(math.log(new[name] / old[name])) > 0.01
        if "time_ratio" in a and name == "time":
            (low, _, high), (low_b, _, high_b) = a["time_ratio"], b["time_ratio"]
            moved = low_b > high or high_b < low
        if moved:
            yield f"{name} ratio {old[name]:.3f} -> {new[name]:.3f}", change


def markdown(records: list[dict], only: str = "") -> list[str]:
    """The records as a Markdown table, for the README.

    Args:
      only: parts of names of rows, separated by commas; all rows by default.
    """
    records = [r for r in records if any(p in r["row"] for p in only.split(","))]
    titles, figures = ["row", "size", "against"], []
    if any("devices" in r for r in records):
        if any("target" in r for r in records):
            titles, figures = ["row", "size", "target"], sharded.ESTIMATES
        shown = {"collectives": "count", "bytes sent": "sent", "temporary memory": "memory"}
    elif any("target" in r for r in records):
        shown = {"temporary memory": "memory", "bytes moved": "moved", "kernels": "kernels"}
    else:
        shown = {"time": "time", "temporary memory": "memory"}
    columns = [*titles, *shown, *figures]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in records:
        if "error" not in r:
            found = ratios(r)
            shares = [_number(found.get(name), ".2f") for name in shown.values()]
            special = [sharded.cells(r)[name] for name in figures]
            lines.append(f"| {' | '.join([*map(r.get, titles), *shares, *special])} |")
    return [*lines, "", *means(records)]
