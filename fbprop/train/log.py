"""The record of a run: one JSON object a line, one line a round."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from fbprop.watch.log import read_log


class Log:
    """Appends rows to a file; without a path, only remembers them."""

    def __init__(self, path: str | os.PathLike | None, step: int, writes: bool = True):
        """Continues at ``step``: rows of later ones, from a run that went on, are dropped.

        ``writes``: whether this process does; of several, one.
        """
        self.path = None if path is None else pathlib.Path(path)
        self.rows: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            self.rows = [row for row in read_log(self.path) if row["step"] <= step]
        if self.path is None or not writes:
            self.path = None
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(map(_line, self.rows)), encoding="utf-8")
        os.replace(partial, self.path)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(row))


def _line(row) -> str:
    return json.dumps(_finite(row)) + "\n"


def _finite(x):
    """JSON has no NaN or infinity: None instead."""
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, list):
        return [*map(_finite, x)]
    return None if isinstance(x, float) and not math.isfinite(x) else x
