"""Lines of the table, and of a results file, about programs compiled and not run."""

from __future__ import annotations

from benchmarks.targets.compiled import Compiled

FIGURES = {  # in a record, a pair (fbprop's, the other's); in the table, their ratio
    "temp_bytes": "memory", "moved_bytes": "moved", "kernels": "kernels", "flops": "flops",
    "seconds": "time",
}
FLOORS = {"temp_bytes": 1 << 16, "moved_bytes": 1 << 16, "kernels": 5}  # less is noise
COLUMNS = (
    ("row", 28), ("size", 32), ("against", 7), ("memory", 7), ("moved", 6), ("kernels", 7),
    ("flops", 6), ("time", 6), ("temp MB", 9), ("moved MB", 10), ("run", 6), ("GFLOP", 9),
    ("ms", 8),
)


def record(measured: Compiled, kind: str, source: dict) -> dict:
    """One row as a line of a results file."""
    row = measured.row
    figures = {name: getattr(measured, name) for name in FIGURES}
    return {"row": row.name, "size": row.size, "kind": kind, "against": measured.against,
            **figures, **source}


def ratios(r: dict) -> dict[str, float]:
    """fbprop / other, by title of the column, of what there is."""
    found = {}
    for name, title in FIGURES.items():
        if r.get(name) and None not in r[name]:
            ours, theirs = (max(x, FLOORS.get(name, 0)) for x in r[name])
            found[title] = ours / theirs
    return found


def cells(r: dict) -> dict[str, str]:
    """What stands in the columns of the table."""
    absolute = {"temp MB": ("temp_bytes", 1e-6, ".2f"), "moved MB": ("moved_bytes", 1e-6, ".1f"),
                "run": ("kernels", 1, ".0f"), "GFLOP": ("flops", 1e-9, ".2f"),
                "ms": ("seconds", 1e3, ".3f")}
    found = {title: f"{ratio:.3f}" for title, ratio in ratios(r).items()}
    for title, (name, unit, form) in absolute.items():
        if r[name][0] is not None:
            found[title] = format(r[name][0] * unit, form)
    return {"row": r["row"], "size": r["size"], "against": r["against"], **found}
