"""The meter: agreement first, then compile time, temporary memory, and interleaved run times."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.row import Row

SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated within one sample
PEER_TOLERANCE = 1e-4  # other layouts and other approximations of exp, one float32 loss
FEWEST, MOST = 5, 100  # samples of each program


class Disagreement(AssertionError):
    """The two programs do not compute the same numbers: nothing is timed."""


@dataclass
class Measurement:
    """What was measured of a row; index 0 is fbprop, index 1 what it is compared with.

    ``seconds`` holds one sample per repeat, pairs adjacent in time; ``compile_seconds`` likewise
    (trace, lower and compile, all caches cold); ``temp_bytes`` is XLA's temporary memory.
    """

    row: Row
    against: str
    agreement: float
    seconds: tuple[list[float], list[float]]
    compile_seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    temp_bytes: tuple[int, int] | None = None

    def time_ratio(self) -> tuple[float, float, float]:
        """Ratio fbprop / other of adjacent samples: 20th, 50th and 80th percentile."""
        return _percentiles(self.seconds)

    def compile_ratio(self) -> float | None:
        """Median ratio of compile times, None if nothing was compiled."""
        return _percentiles(self.compile_seconds)[1] if self.compile_seconds[0] else None

    def memory_ratio(self) -> float | None:
        """Ratio of temporary memory; equal when both have none, None if not compiled."""
        if self.temp_bytes is None:
            return None
        ours, theirs = self.temp_bytes
        return ours / theirs if theirs else (1.0 if ours == 0 else float("inf"))


def _percentiles(pairs):
    ratios = np.array(pairs[0]) / np.array(pairs[1])
    return tuple(float(p) for p in np.percentile(ratios, [20, 50, 80]))


def measure(row: Row, ours, theirs, seconds: float, clock=time.perf_counter) -> Measurement:
    """Measure ``row.build(ours)`` against ``row.build(theirs)``.

    Args:
      row: what to measure.
      ours, theirs: modules with ``vjp`` and ``value_and_grad``, normally `fbprop` and `jax`.
      seconds: about how long to sample run times (at least ``FEWEST`` samples of each).
      clock: seconds so far; `time.process_time` ignores what else runs on the machine, and adds
        up threads.

    Raises:
      Disagreement: results differ by more than ``row.tolerance``; checked before any timing.
    """
    if row.jitted:
        programs, compile_seconds = zip(*(_compile(row, ad, clock) for ad in (ours, theirs)))
        temp_bytes = tuple(p.memory_analysis().temp_size_in_bytes for p in programs)
    else:
        programs, compile_seconds, temp_bytes = (row.build(ours), row.build(theirs)), (), None
    agreement = _assert_agreement(row, programs)
    samples = interleave([_runner(row, p) for p in programs], seconds, clock)
    compiles = tuple([s] for s in compile_seconds) or ([], [])
    for _ in range(_compile_repeats(compile_seconds, seconds)):
        for ad, times in zip((ours, theirs), compiles):
            times.append(_compile(row, ad, clock)[1])
    return Measurement(row, "jax", agreement, samples, compiles, temp_bytes)


def measure_peer(row: Row, ours, peer: str, make_step, seconds, clock=time.perf_counter):
    """Measure against another library: the result is checked, then run times.

    Args:
      make_step: ``(params, batch) -> run``; ``run()`` does what the row does. Of a whole step it
        returns the loss before it, of other rows the row's result. If it has a number
        ``temp_bytes``, its temporary memory is compared too.
      row, ours, seconds, clock: see `measure`.
    """
    program, _ = _compile(row, ours, clock)
    result = program(*_copies(row.probe or row.inputs))
    if row.carries:
        (params, _), batch = row.inputs[:2]
        # An epoch has one loss per step; those after the first depend on the learning rate.
        result = np.ravel(np.float64(result[1]))[0]
    else:
        params, *batch = row.inputs
    run = make_step(params, batch)
    difference = relative_difference(run(), result)
    # Of 16-bit steps, whose own tolerance is 0.1, the loss is a mean over all tokens.
    tolerance = max(PEER_TOLERANCE, row.tolerance / 10)
    if not difference <= tolerance:
        raise Disagreement(
            f"A peer computes the same from the same parameters, got a relative difference of "
            f"{difference:.2e} expected at most {tolerance:.0e}: fix its model."
        )
    samples, theirs = interleave([_runner(row, program), run], seconds, clock), None
    if row.jitted and hasattr(run, "temp_bytes"):
        theirs = program.memory_analysis().temp_size_in_bytes, run.temp_bytes
    return Measurement(row, peer, difference, samples, temp_bytes=theirs)


def _compile(row, ad, clock):
    jax.clear_caches()  # neither program finds the other's inner functions already traced
    jitted = jax.jit(row.build(ad), donate_argnums=(0,) if row.carries else ())
    start = clock()
    compiled = jitted.lower(*row.inputs).compile()
    return compiled, clock() - start


def _compile_repeats(first, seconds):
    return int(np.clip(3 * seconds / sum(first), 0, 6)) if first else 0


def _assert_agreement(row, programs):
    got, expected = (p(*_copies(row.probe or row.inputs)) for p in programs)
    difference = relative_difference(got, expected)
    if not difference <= row.tolerance:
        raise Disagreement(
            f"fbprop and JAX agree on what is measured, got a largest relative difference of "
            f"{difference:.2e} expected at most {row.tolerance:.0e} in {row.name} {row.size}: "
            "the rule is wrong, or the row needs a tolerance with its reason."
        )
    return difference


def relative_difference(got, expected) -> float:
    """Largest over leaves of max |got - expected| / max |expected|; infinite for NaN."""
    return max(jax.tree.leaves(jax.tree.map(_leaf_difference, got, expected)), default=0.0)


def _leaf_difference(got, expected):
    wide = np.complex128 if jnp.iscomplexobj(expected) else np.float64
    got, expected = (np.asarray(x, wide) for x in (got, expected))
    if got.size == 0 or np.array_equal(got, expected):
        return 0.0
    scale = np.max(np.abs(expected))
    error = np.max(np.abs(got - expected))
    return float(error / scale) if scale > 0 and np.isfinite(error) else float("inf")


def _copies(args):
    """Arrays that a program may consume by donation."""
    return jax.tree.map(jnp.copy, args)


def _runner(row, program):
    """A function of no arguments that runs the program once and waits for it."""
    args = list(_copies(row.inputs) if row.carries else row.inputs)

    def run():
        out = jax.block_until_ready(program(*args))
        if row.carries:
            args[0] = out[0]

    return run


def interleave(runs, seconds: float, clock=time.perf_counter) -> tuple[list[float], ...]:
    """Samples of each function, taken in turn A B A B, so that a drift of the machine meets all.

    One call before each sample is not timed: what is measured is a program called again and again.
    The first call after a program of 90 MB of temporary memory takes twice as long as the next.
    """
    calls = [_calls_per_sample(run) for run in runs]
    samples = tuple([] for _ in runs)
    end = time.perf_counter() + seconds
    while len(samples[-1]) < FEWEST or (
        time.perf_counter() < end and len(samples[-1]) < MOST
    ):
        for run, n, times in zip(runs, calls, samples):
            run()  # memory that the program before has returned to the system is mapped here
            start = clock()
            for _ in range(n):
                run()
            times.append((clock() - start) / n)
    return samples


def _calls_per_sample(run):
    """How many calls fill one sample, by the fastest of three; the first call warms up."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(1, round(SHORTEST_SAMPLE / max(min(times), 1e-7)))
