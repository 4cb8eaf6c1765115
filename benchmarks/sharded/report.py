"""Lines of the table, and of a results file, about programs for several devices."""

from __future__ import annotations

from benchmarks.sharded.compiled import Spread
from benchmarks.sharded.estimate import RATES, seconds
from benchmarks.targets import kind as kind_of

FIGURES = {  # in a record, a pair (fbprop's, the other's); in the table, their ratio
    "collectives": "count", "sent_bytes": "sent", "temp_bytes": "memory",
}
COLUMNS = (
    ("row", 24), ("size", 30), ("against", 7), ("agree", 8), ("count", 7), ("sent", 7),
    ("memory", 7), ("run", 5), ("sent KB", 10), ("temp KB", 10), ("kinds", 40),
)

TARGET_COLUMNS = (
    ("row", 26), ("size", 34), ("against", 7), ("count", 7), ("sent", 7), ("memory", 7),
    ("run", 6), ("sent GB", 8), ("GB", 7), ("room GB", 8), ("ms", 9), ("share", 6), ("kinds", 40),
)
ESTIMATES = ["GB", "room GB", "sent GB", "ms", "share"]  # of a target, in a README's table


def record(measured: Spread, kind: str, source: dict) -> dict:
    """One row as a line of a results file."""
    row = measured.row
    figures = {name: getattr(measured, name) for name in (*FIGURES, "kinds", "agreement")}
    return {"row": row.name, "size": row.size, "kind": kind, "against": measured.against,
            **figures, **_estimates(measured, source), **source}


def _estimates(measured, source) -> dict:
    """Of a target: memory of a device, what it has left, time and utilisation at its rates."""
    if measured.chip_bytes is None:
        return {}
    rates, flops = RATES[kind_of(source["target"])], measured.row.flops / source["devices"]
    times = [seconds(rates, flops, memory, received)
             for memory, received in zip(measured.chip_bytes, measured.received_bytes)]
    return {
        "chip_bytes": measured.chip_bytes, "room_bytes": rates.capacity - measured.chip_bytes[0],
        "received_bytes": measured.received_bytes, "seconds": times,
        "utilisation": [flops / t / rates.flops for t in times],
    }


def ratios(r: dict) -> dict[str, float]:
    """fbprop / other, by title of the column; nothing against nothing is 1."""
    found = {}
    for name, title in FIGURES.items():
        ours, theirs = r[name]
        found[title] = ours / theirs if theirs else (1.0 if ours == 0 else float("inf"))
    return found


def cells(r: dict) -> dict[str, str]:
    """What stands in the columns of the table."""
    agreement = "-" if r["agreement"] is None else f"{r['agreement']:8.0e}"
    kinds = " ".join(f"{n} {kind}" for kind, n in sorted(r["kinds"][0].items()))
    special = {} if "chip_bytes" not in r else {
        "sent GB": f"{r['sent_bytes'][0] / 1e9:.2f}", "GB": f"{r['chip_bytes'][0] / 1e9:.2f}",
        "room GB": f"{r['room_bytes'] / 1e9:.2f}", "ms": f"{r['seconds'][0] * 1e3:.0f}",
        "share": f"{r['utilisation'][0]:.0%}",
    }
    return {
        "row": r["row"], "size": r["size"], "against": r["against"], "agree": agreement, **special,
        **{title: f"{ratio:.3f}" for title, ratio in ratios(r).items()},
        "run": str(r["collectives"][0]), "sent KB": f"{r['sent_bytes'][0] / 1e3:.1f}",
        "temp KB": f"{r['temp_bytes'][0] / 1e3:.1f}", "kinds": kinds,
    }
