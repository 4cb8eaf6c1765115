"""Reading the log of a run: what `fbprop.train` goes on from and draws, and a page is made of."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a log that `fbprop.train.fit` wrote, the first round first.

    Each is ``{"step", "epoch", "seconds", "train": {name: mean over the round}}``, with held-out
    data also ``"held_out": {name: value}``, and of a run that is watched ``"watch"``, for
    `fbprop.watch.page`; a number that was not finite is None. A last line that was cut off is left
    out.

    Raises:
      ValueError: a line before the last is not JSON.

    Example:
      >>> import pathlib, tempfile
      >>> from fbprop import train
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     log = pathlib.Path(folder, "log.jsonl")
      ...     _ = log.write_text('{"step": 10, "train": {"loss": 0.5}}\\n{"step": 2')
      ...     train.read_log(log)
      [{'step': 10, 'train': {'loss': 0.5}}]
    """
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(
                    f"A log has one JSON object a line, got {line[:40]!r} in line {number} of "
                    f"{path}; expected one as fbprop.train.fit writes them."
                ) from None
    return rows
