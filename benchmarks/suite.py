"""Run rows: the table as it grows, a progress line, the geometric means, failures at the end."""

from __future__ import annotations

import functools
import time

import jax
import numpy as np

import benchmarks.rows  # noqa: F401  (fills the table of rows)
import fbprop
from benchmarks import adam, machine, report, targets
from benchmarks.meter import measure, measure_peer
from benchmarks.peers import missing, step
from benchmarks.row import entries
from benchmarks.sharded import compiled as spread
from benchmarks.sharded import report as spread_report
from benchmarks.targets import compiled
from benchmarks.targets import report as compiled_report

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SECONDS = {"smoke": 0.1, "small": 1.0, "full": 5.0}


def selected(only: str, size: str, accelerator: bool = False, devices: int = 1):
    """Rows whose name contains one of the comma-separated patterns, or equals it after ``=``.

    Args:
      devices: rows for so many; for more than one those for several.
      accelerator: whether rows at an accelerator's sizes are among them; where there is a GPU
        they are.
    """
    patterns = only.split(",")
    accelerator = accelerator or (devices == 1 and jax.default_backend() == "gpu")
    return [
        e for e in entries(size)
        if any(e.name == p[1:] if p.startswith("=") else p in e.name for p in patterns)
        and (accelerator or not e.accelerator)
        and (e.devices == devices if accelerator or devices == 1 else 1 < e.devices <= devices)
    ]


def run(chosen, seconds, clock, peers, write) -> int:
    """Measure rows and print the table; returns 1 if a row failed, else 0."""
    source = {**machine.provenance(), "clock": clock}
    absent = missing(peers)
    _introduce(source, absent)
    present = [p for p in peers if p not in absent]
    return _table(chosen, lambda e: records(e, seconds, source, present), write, report.COLUMNS)


def compile_for(target: str, chosen, write) -> int:
    """Compile rows for devices that need not be there; as `run`, without a run."""
    on, *others = targets.devices(target)
    name = targets.TARGETS[targets.kind(target)].device
    source = {"target": target, **machine.provenance(), "device": name, "platform": on.platform,
              "compiler": targets.compiler(target)}
    if others:
        source["devices"] = 1 + len(others)
    print(f"compiled for {source['device']}, jax {jax.__version__}, {source['compiler']}, commit "
          f"{source['commit']}; Adam in whole steps: fbprop's, against {adam.described()}")
    print("fbprop / other, below 1 fbprop wins; see benchmarks/README.md\n")

    def compiled_records(entry):
        try:
            if others:
                found = spread.measure(entry.row(), fbprop, jax, np.array([on, *others]), run=False)
                yield spread_report.record(found, entry.kind, source)
                return
            measured = compiled.measure(entry.row(), fbprop, jax, on)
            yield compiled_report.record(measured, entry.kind, source)
        except Exception as error:
            yield report.failure(entry, "jax", error, source)

    chosen = [e for e in chosen if e.kind != "cost"]  # those are about running
    columns = spread_report.TARGET_COLUMNS if others else compiled_report.COLUMNS
    return _table(chosen, compiled_records, write, columns)


def count(devices: int, chosen, write) -> int:
    """Compile and run rows on several devices, and count what they send; as `run`."""
    source = {"devices": devices, **machine.provenance()}
    print(f"{devices} x {source['device']}, jax {jax.__version__}, commit {source['commit']}; Adam "
          f"in whole steps: fbprop's, against {adam.described()}")
    print("fbprop / other, below 1 fbprop wins; see benchmarks/README.md\n")

    def counted(entry):
        try:
            measured = spread.measure(entry.row(), fbprop, jax, np.array(jax.devices()))
            yield spread_report.record(measured, entry.kind, source)
        except Exception as error:
            yield report.failure(entry, "jax", error, source)

    return _table(chosen, counted, write, spread_report.COLUMNS)


def _table(chosen, records_of, write, columns) -> int:
    print(report.header(columns))
    progress, records = report.Progress(len(chosen)), []
    for entry in chosen:
        progress.start(entry)
        for record in records_of(entry):
            progress.clear()
            print(report.line(record), flush=True)
            write(record)
            records.append(record)
    print("", *report.means(records), sep="\n")
    failed = sum("error" in r for r in records)
    if failed:
        print(f"{failed} of {len(records)} measurements failed.")
    return 1 if failed else 0


def _introduce(source, absent):
    versions = ", ".join(f"{p} {v}" for p, v in source["versions"].items())
    print(f"{source['device']}, {source['threads']} threads, {versions}, commit {source['commit']}")
    print(f"Adam in whole steps: fbprop's, against {adam.described()}")
    for peer, reason in absent.items():
        print(f"{peer} is not measured: {reason}")
    print("time, memory, compile: fbprop / other, below 1 fbprop wins; see benchmarks/README.md\n")


def records(entry, seconds, source, peers):
    """A record per rival; a failure is a line of the table and the exit status, not the end."""
    clock = CLOCKS[source["clock"]]
    rivals = {"jax": lambda: measure(entry.row(), fbprop, jax, seconds, clock)}
    for peer in peers:
        if make := step(peer, entry.name):
            rivals[peer] = functools.partial(
                lambda *a: measure_peer(entry.row(), fbprop, *a, seconds, clock), peer, make)
        elif entry.kind in ("step", "network"):
            print(f"{peer} has no version of {entry.name}")
    for rival, measured in rivals.items():
        try:
            yield report.record(measured(), entry.kind, source)
        except Exception as error:
            yield report.failure(entry, rival, error, source)
