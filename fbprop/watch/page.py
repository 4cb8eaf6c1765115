"""A page to look at what flowed: one file, without a network, from a report or a run's history."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from fbprop.watch.findings import findings
from fbprop.watch.history import look, network
from fbprop.watch.report import Report

TEMPLATE = pathlib.Path(__file__).with_name("page.html")
PLACE = "/*data*/"


def page(
    source: Report | list[dict[str, Any]], file: str | os.PathLike | None = None,
    title: str = "What flows",
) -> str:
    """A page that shows a network from its first layer to its loss, as one HTML file.

    A bar per point, under its scopes: as wide as the bytes kept for the backward pass, coloured by
    the norm of the gradient, at the look that a slider chooses; the curves of loss, metrics and
    learning rate; what is wrong, in words (`fbprop.watch.findings`); and on click all statistics
    of a point and its rule's mathematics.

    Args:
      source: a report of `fbprop.watch.value_and_grad`; or the rows of a run with looks
        (``train.fit(..., watch=100)``): ``Fit.history``, or those of `fbprop.train.read_log`.
      file: where to write it; None: nowhere.
      title: of the page.

    Returns:
      The page's text.

    Raises:
      TypeError: neither a report nor rows.   ValueError: rows without looks.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import watch
      >>> _, report = watch.value_and_grad(lambda x: jnp.sum(jnp.tanh(x)))(jnp.ones(3))
      >>> watch.page(report).startswith("<!doctype html>")
      True
    """
    data = _of_report(source) if isinstance(source, Report) else _of_rows(source)
    data["title"] = title
    data["findings"] = findings(data["network"], data["looks"])
    text = json.dumps(_plain(data), allow_nan=False).replace("</", "<\\/")
    html = TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)
    if file is not None:
        pathlib.Path(file).write_text(html, encoding="utf-8")
    return html


def _of_report(report):
    return {"network": network(report), "looks": [look(0, report)], "curves": {}}


def _of_rows(rows):
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(
            f"A page is of a Report or of a run's rows, got {type(rows).__name__} expected e.g. "
            "Fit.history or fbprop.train.read_log(path)."
        )
    watched = [row["watch"] for row in rows if "watch" in row]
    described = [w["network"] for w in watched if "network" in w]
    if not described:
        raise ValueError(
            f"A page shows looks at what flows, got {len(rows)} rows without any; expected those "
            "of a run that was watched: fbprop.train.fit(..., watch=100)."
        )
    # A run that went on describes its network again; of another network, only the last is shown.
    n = len(described[-1]["points"])
    looks = [s for w in watched for s in w["seen"] if len(s["value"]) == n]
    curves = {"loss": {}}
    for row in rows:
        for part in ("train", "held_out"):
            for name, value in row.get(part, {}).items():
                curves.setdefault(name, {}).setdefault(part, []).append([row["step"], value])
    rates = [[s["step"], s["rate"]] for s in looks if "rate" in s]
    if rates:
        curves["learning rate"] = {"train": rates}
    curves = {name: parts for name, parts in curves.items() if parts}
    return {"network": described[-1], "looks": looks, "curves": curves}


def _plain(x):
    """JSON has no nan or infinity: in their place a word."""
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [*map(_plain, x)]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
