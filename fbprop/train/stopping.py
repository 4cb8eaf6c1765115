"""When a run should stop, and what to think of its losses meanwhile."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np


class NonFiniteLoss(FloatingPointError):
    """The loss, the gradients or the parameters are no numbers any more.

    Attributes:
      step: the number of the step, the first being 1.
      checkpoint: path of the last good checkpoint, or None.
      operation: the `fbprop.watch.Origin` of it, or None where it is not known.
    """

    def __init__(self, what: str, step: int, checkpoint, operation=None):
        left = (
            f"the last good checkpoint is {checkpoint}" if checkpoint is not None
            else "no checkpoint was written (checkpoints=directory writes them)"
        )
        made = "" if operation is None else f"; {operation}"
        super().__init__(
            f"Training stops when its numbers are not finite, got {what} in step {step} expected "
            f"a finite one{made}; {left}: lower the learning rate, clip gradients, or look at the "
            "batch: a class label outside the range of the classes makes a loss nan, and so do "
            "inputs that hold nan or inf."
        )
        self.what, self.step, self.checkpoint = what, step, checkpoint
        self.operation = operation

    def by(self, operation) -> NonFiniteLoss:
        """The same error, with the operation named, if it is known."""
        return NonFiniteLoss(self.what, self.step, self.checkpoint, operation)


def first_bad_step(metrics: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
    """Index and description of the first step [steps] whose loss or gradients are not finite.

    Gradients that overflow under a loss scale are that scale's business, until it has fallen to 1.
    """
    losses = np.asarray(metrics["loss"], np.float64).reshape(-1)
    bad = ~np.isfinite(losses)
    if "skipped" in metrics:
        skipped = np.asarray(metrics["skipped"]).reshape(-1)
        bad |= skipped & (np.asarray(metrics["loss_scale"]).reshape(-1) <= 1)
    if not bad.any():
        return None
    i = int(bad.argmax())
    finite = math.isfinite(losses[i])
    return i, "gradients with nan or inf at loss scale 1" if finite else f"a loss of {losses[i]}"


class LossWatch:
    """Warns, once, when the training loss has lost half of what it had gained.

    The gain is the loss of the first step minus the lowest mean over a window, but at least the
    size of the first: so it is in the loss's own unit, also where losses are negative or near 0.
    A window is made of whole rounds, 20 steps at least, so that one odd batch is no divergence.
    """

    window = 20

    def __init__(self, first: float | None = None, lowest: float | None = None,
                 total: float = 0.0, count: int = 0, warned: bool = False):
        self.first, self.lowest, self.warned = first, lowest, warned
        self.total, self.count = total, count  # of the window that is not full yet

    def see(self, losses: np.ndarray, step: int) -> None:
        """A round's losses [steps], all finite; ``step`` is the number of the last."""
        if self.first is None:
            self.first = self.lowest = float(losses[0])
        self.total += float(np.sum(losses, dtype=np.float64))
        self.count += len(losses)
        if self.count < self.window:
            return
        mean, self.total, self.count = self.total / self.count, 0.0, 0
        gain = max(self.first - self.lowest, abs(self.first))
        if mean - self.lowest > 0.5 * gain and not self.warned:
            self.warned = True
            warnings.warn(
                f"Training diverges: the loss was {self.lowest:.4g} and is {mean:.4g} up to step "
                f"{step}, after {self.first:.4g} in the first; a lower learning rate may help.",
                RuntimeWarning, stacklevel=5,
            )
        self.lowest = min(self.lowest, mean)

    def record(self) -> dict:
        return {name: getattr(self, name) for name in ("first", "lowest", "total", "count",
                                                       "warned")}


class BestSoFar:
    """Which round was best on held-out data, and for how many rounds none was better."""

    def __init__(self, monitor: str, mode: str, value: float | None = None,
                 step: int | None = None, rounds_since: int = 0):
        if mode not in ("min", "max"):
            raise ValueError(
                f'A monitored metric gets better one way, got mode={mode!r} expected "min" or '
                '"max".'
            )
        self.monitor, self.mode = monitor, mode
        self.value, self.step, self.rounds_since = value, step, rounds_since

    def see(self, held_out: Mapping[str, float], step: int) -> bool:
        """Whether this round is the best; NaN never is."""
        if self.monitor not in held_out:
            raise ValueError(
                f"The monitored metric is one that metric() returns, got monitor={self.monitor!r} "
                f"expected one of {sorted(held_out)}."
            )
        value = held_out[self.monitor]
        sign = 1 if self.mode == "min" else -1
        better = not math.isnan(value) and (self.value is None or sign * (value - self.value) < 0)
        if better:
            self.value, self.step, self.rounds_since = value, step, 0
        else:
            self.rounds_since += 1
        return better

    def record(self) -> dict:
        return {"value": self.value, "step": self.step, "rounds_since": self.rounds_since}
