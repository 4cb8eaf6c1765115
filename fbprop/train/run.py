"""What changes during a training run, round by round, and how it outlives the process."""

from __future__ import annotations

import tempfile
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from fbprop.data.tensorfile import CheckpointError
from fbprop.train.checkpoint import check_keep_last, latest, read_manifest, restore, save
from fbprop.train.precision import all_finite
from fbprop.train.shards import agreed
from fbprop.train.stopping import NonFiniteLoss, first_bad_step
from fbprop.train.watching import Nobody


class Run:
    """Where a run is, and everything that changes on its way."""

    def __init__(self, state, position, store, watch, best, held_out, log):
        self.state, self.position, self.step = state, position, int(state.step)
        self.store, self.watch, self.best = store, watch, best
        self.held_out, self.log = held_out, log
        self.unread, self.round, self.started = None, [], time.perf_counter()
        self.kept_best, self.looks = None, Nobody()
        self.finite = jax.jit(all_finite)

    def count(self, dispatch, metrics):
        """Takes note of a dispatch, and looks at the one before, which the device has finished."""
        self.read()
        self.unread = (self.step, metrics)
        self.step += dispatch.steps
        self.position = dispatch.after

    def read(self):
        """Waits for the last dispatch's metrics and checks them."""
        if self.unread is None:
            return
        (start, metrics), self.unread = self.unread, None
        metrics = jax.device_get(metrics)
        if (bad := first_bad_step(metrics)) is not None:
            self.fail(bad[1], start + bad[0] + 1)
        form = np.shape(metrics["loss"])  # only metrics that are one number a step are reported
        self.round.append(
            {k: np.reshape(m, -1) for k, m in metrics.items() if np.shape(m) == form}
        )

    def fail(self, what, number):
        raise NonFiniteLoss(what, number, None if self.store is None else self.store.last)

    def end_round(self):
        """Held-out metrics, history, log, checkpoint."""
        self.read()
        if not self.finite(self.state.params):
            self.fail("parameters with nan or inf", self.step)
        columns = {k: np.concatenate([d[k] for d in self.round]) for k in self.round[0]}
        row = {
            "step": self.step, "epoch": self.position.epoch,
            "seconds": round(time.perf_counter() - self.started, 3),
            "train": {k: float(np.mean(v, dtype=np.float64)) for k, v in columns.items()},
        }
        self.watch.see(columns["loss"], self.step)
        if self.held_out is not None:
            row["held_out"] = self.held_out(self.state)
            if self.best.see(row["held_out"], self.step) and self.store is None:
                self.kept_best = _on_host(self.state)
        self.log.add(row | self.looks.take())
        if self.store is not None:
            self.store.save(self)
        self.round, self.started = [], time.perf_counter()

    def best_state(self):
        """The best state of the run, from memory or from its checkpoint."""
        if self.best.step is None or self.best.step == self.step:
            return self.state
        if self.store is None:
            return jax.tree.map(jnp.asarray, self.kept_best)
        try:
            return restore(self.store.path(self.best.step), self.state)
        except (OSError, CheckpointError) as error:
            warnings.warn(
                f"The best round is read from its checkpoint, got {error!s} expected the one of "
                f"step {self.best.step}: Fit.best is the last state instead.",
                RuntimeWarning, stacklevel=3,
            )
            return self.state

    def text(self):
        """The latest numbers, for the progress line."""
        parts = [f"loss {self.round[-1]['loss'][-1]:.4g}"] if self.round else []
        for k, v in (self.log.rows[-1].get("held_out", {}) if self.log.rows else {}).items():
            parts.append(f"held-out {k} {v:.4g}")
        return "  ".join(parts)


class Store:
    """A run's checkpoints."""

    def __init__(self, directory, keep_last):
        check_keep_last(keep_last)
        _check_writable(directory)
        self.directory, self.keep_last, self.last = directory, keep_last, None

    def path(self, step):
        return self.directory / f"step-{step:08d}.safetensors"

    def resume(self, state, wanted):
        """The newest checkpoint's state and record, or ``state`` and no record."""
        self.last = agreed(lambda: latest(self.directory))
        if self.last is None:
            return state, {}
        if not wanted:
            raise ValueError(
                f"A new run has a directory of its own, got resume=False and {self.last}; expected "
                "no checkpoints: remove them, choose another directory, or resume."
            )
        return restore(self.last, state), read_manifest(self.last)["metadata"]

    def save(self, run):
        record = {
            "position": [*run.position], "loss": run.watch.record(), "best": run.best.record(),
        }
        best = [] if run.best.step is None else [self.path(run.best.step)]
        self.last = save(
            self.path(run.step), run.state, metadata=record, keep_last=self.keep_last, keep=best
        )


def _check_writable(directory):
    """Makes the directory, and sees before any training that files can be made in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"Checkpoints need a directory that can be written to, got {directory} ({error}); "
            "expected another path, or another owner."
        ) from error


def _on_host(state):
    """A copy that survives the donation of the state; one on several devices stays there."""
    def one(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jnp.copy(x) if is_key or len(x.sharding.device_set) > 1 else np.array(x)

    return jax.tree.map(one, state)
