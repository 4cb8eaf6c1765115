"""What a training run writes down of what flowed: once of the network, then of every look at it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fbprop import rules as _rules
from fbprop.watch.flow import ALL, checked
from fbprop.watch.points import EVERYTHING
from fbprop.watch.report import Report


class Every(NamedTuple):
    """How often `fbprop.train.fit` looks at what flows, and at what; see `every`."""

    steps: int
    where: str = EVERYTHING
    of: tuple[Callable, ...] = ALL
    rate: Callable | float | None = None


def every(
    steps: int, where: str = EVERYTHING, of: Sequence[Callable] = ALL,
    rate: Callable | float | None = None,
) -> Every:
    """For ``fbprop.train.fit(..., watch=)``: a look every so many steps, or a little later.

    Args:
      steps: between two looks; each is one more gradient, of the last batch.
      where, of: see `fbprop.watch.value_and_grad`.
      rate: the learning rate, or its schedule, to be written down with it.

    Raises:
      ValueError, TypeError: not a positive number; as `fbprop.watch.value_and_grad`.

    Example:
      >>> from fbprop import optim, watch
      >>> schedule = optim.cosine(1e-3, 100, 1000)
      >>> watch.every(100, where="encoder/*", of=[watch.norm], rate=schedule).steps
      100
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"Steps between two looks are 1 or more, got {steps!r} expected e.g. 100.")
    if not isinstance(where, str):
        raise TypeError(f"where is a pattern on the path, got {where!r} expected e.g. 'encoder/*'.")
    return Every(steps, where, checked(of), rate)


def network(report: Report, table=None) -> dict[str, Any]:
    """What stays the same: the points, and the mathematics of their rules, as plain data."""
    table = _rules.current() if table is None else table
    points = [p._asdict() | {"shape": list(p.shape), "steps": list(p.steps)} for p in report.points]
    names = sorted({p.primitive.split(" ")[0] for p in report.points})
    return {"points": points, "rules": {n: table[n].math for n in names if n in table}}


def look(step: int, report: Report, **more: float) -> dict[str, Any]:
    """What was seen at a step, as plain data, six digits of each number."""
    rows = report.rows()
    return {
        "step": step, **more, "value": [_rounded(r["value"]) for r in rows],
        "cotangent": [_rounded(r["cotangent"]) for r in rows],
    }


def _rounded(x):
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [*map(_rounded, x)]
    if isinstance(x, complex):
        x = abs(x)
    return float(f"{x:.6g}") if isinstance(x, float) and math.isfinite(x) else x
