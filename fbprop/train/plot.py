"""Learning curves from a log: ``python -m fbprop.train.plot LOG.jsonl -o curves.png``."""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from fbprop.train.log import read_log

_PARTS = {"train": "training", "held_out": "held-out"}


def curves(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, tuple[list, list]]]:
    """The curves in a log's rows: metric -> "training" or "held-out" -> (steps, values).

    Rounds in which a value was not finite are left out of its curve.

    Example:
      >>> from fbprop.train.plot import curves
      >>> rows = [{"step": n, "train": {"loss": 1 / n}, "held_out": {"loss": 2.0}} for n in (1, 2)]
      >>> curves(rows)
      {'loss': {'training': ([1, 2], [1.0, 0.5]), 'held-out': ([1, 2], [2.0, 2.0])}}
    """
    found: dict[str, dict[str, tuple[list, list]]] = {}
    for row in rows:
        for part, label in _PARTS.items():
            for name, value in row.get(part, {}).items():
                if value is not None and math.isfinite(value):
                    steps, values = found.setdefault(name, {}).setdefault(label, ([], []))
                    steps.append(row["step"])
                    values.append(value)
    return found


def draw(logs: dict[str, list[dict[str, Any]]], file: str | os.PathLike) -> None:
    """Draws one panel a metric, the loss first, one colour a log, held-out curves in full lines.

    Args:
      logs: name -> rows, as `fbprop.train.read_log` gives them.
      file: the picture, of the type that its ending says.

    Raises:
      ImportError: matplotlib is missing.   ValueError: the logs have no rounds.
    """
    from matplotlib.figure import Figure

    found = {name: curves(rows) for name, rows in logs.items()}
    metrics = list(dict.fromkeys(name for log in found.values() for name in log))
    if not metrics:
        raise ValueError(
            f"A curve has points, got logs without rounds, {sorted(logs)}; expected a row for each "
            "round that fbprop.train.fit has finished."
        )
    figure = Figure(figsize=(5 * len(metrics), 3.5), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for number, (name, log) in enumerate(found.items()):
            for label, (steps, values) in log.get(metric, {}).items():
                panel.plot(
                    steps, values, "-" if label == "held-out" else "--", color=f"C{number}",
                    label=label if len(found) == 1 else f"{name}, {label}",
                )
        panel.set(xlabel="step", ylabel=metric)
        panel.legend()
    figure.savefig(file, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fbprop.train.plot", description=__doc__.partition(":")[0] + "."
    )
    parser.add_argument("logs", nargs="+", metavar="LOG", help="JSON lines written by fit(log=...)")
    parser.add_argument("-o", "--output", default="curves.png", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        draw({pathlib.Path(log).stem: read_log(log) for log in options.logs}, options.output)
    except ImportError:
        parser.error("curves are drawn with matplotlib, which is missing: pip install matplotlib")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
