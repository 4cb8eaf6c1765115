"""A run's progress on the terminal: tqdm's bar if it is installed, else one updating line."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time

_INTERVAL = 0.2  # seconds between updates of the line


class Progress:
    """Steps done and a text beside them, on standard error; silent where that is no terminal."""

    def __init__(self, total: int | None, done: int = 0, show: bool | None = None):
        """``total`` steps, None if unknown; ``show`` True or False overrides the terminal's say."""
        self.total, self.done, self.text = total, done, ""
        self.started, self.shown, self.at_start = time.monotonic(), 0.0, done
        self.visible = sys.stderr.isatty() if show is None else show
        self.bar = None
        if self.visible and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def update(self, steps: int, text: str) -> None:
        self.done += steps
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(steps)
        elif self.visible and time.monotonic() - self.shown >= _INTERVAL:
            self._write_line()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.visible:
            self._write_line()
            sys.stderr.write("\n")
        self.visible = False

    def _write_line(self):
        self.shown = time.monotonic()
        rate = (self.done - self.at_start) / max(self.shown - self.started, 1e-9)
        of = "" if self.total is None else f"/{self.total}"
        line = f"step {self.done}{of}  {rate:.1f} steps/s  {self.text}"
        width = shutil.get_terminal_size().columns - 1
        # Return to the line's start, and clear what a longer text before has left behind.
        sys.stderr.write("\r" + line[:width].ljust(width))
        sys.stderr.flush()
