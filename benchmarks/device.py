"""An accelerator that is at hand for minutes: what matters most is measured first.

``python -m benchmarks device --json FILE``. Every result is written as it comes, so that a run that
is cut off loses nothing; after ``--minutes`` nothing more is started.

1. Agreement with `jax.vjp` on the device, rule family by rule family, in float32 and bfloat16.
2. GPT-2 124M in bfloat16, the largest batch that fits: tokens per second, model-flops utilisation.
3. Whole steps, by what there is to gain; 4. adding rows to tables.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import fbprop
from benchmarks import machine, report, suite
from benchmarks.meter import relative_difference
from benchmarks.peers import missing
from fbprop.check import random_cotangent

PEERS = ("torch.compile",)
GPT = ("gpt2_124m_step", "gpt_step")  # the second where the first has no size, at smoke
STEPS = ("resnet_step", "vit_step", "lstm_character_step", "word_embedding_step",
         "graph_network_step", "convnet_epoch")
ROWS = ("embedding", "gather", "scatter")
# Between two ways to compute the same in one precision; float32 products in full.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
# bfloat16 operations per second of a tensor core product, without sparsity (NVIDIA's data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def run(size: str, minutes: float, seconds: float | None, write) -> int:
    """Measure until the time is over; returns 1 if something failed or disagreed, else 0.

    Args:
      size: "smoke", "small" or "full".
      minutes: after which nothing more is started.
      seconds: of sampling per row.
      write: takes each record, a dict, as it comes.
    """
    end = time.monotonic() + 60 * minutes
    source = {**machine.provenance(), "clock": "wall"}
    print(f"{source['device']}, {source['versions']}, commit {source['commit']}", flush=True)
    failed = 0
    for one in _work(size, seconds or suite.SECONDS[size] / 2, source):
        for record in one():
            print(line(record), flush=True)
            write(record)
            failed += "error" in record
        if time.monotonic() > end:
            print(f"{minutes:g} minutes are over: the rest is not measured.")
            break
    return 1 if failed else 0


def _work(size, seconds, source):
    """What there is to do, in order: functions that yield records."""
    for dtype in TOLERANCES:
        for family in families():
            yield lambda family=family, dtype=dtype: [agreement(family, dtype, source)]
    fits = []  # of batch sizes, the largest first, one is enough
    for entry in _entries(size, GPT):
        if not fits:
            yield lambda entry=entry: _largest(entry, seconds, source, fits)
    for entry in _entries(size, STEPS + ROWS):
        yield lambda entry=entry: suite.records(entry, seconds, source, [])


def _entries(size, names):
    entries = {name: [] for name in names}
    for e in suite.selected("", size, accelerator=jax.default_backend() != "cpu"):
        for name in names:
            if e.name == name or (name in ROWS and name in e.name and e.kind == "operation"):
                entries[name].append(e)
    return [e for name in names for e in entries[name]]


def _largest(entry, seconds, source, fits):
    """Records of a batch size, remembered if it ``fits``."""
    present = [p for p in PEERS if p not in missing(PEERS)]
    for record in suite.records(entry, seconds, source, present):
        if "error" not in record:
            fits.append(entry)
            record |= throughput(entry, record)
        elif record["against"] == "jax" and "RESOURCE_EXHAUSTED" in record["error"]:
            record["too_large"] = record.pop("error")
        yield record


def throughput(entry, record) -> dict:
    """Tokens per second of either side and model-flops utilisation, of a GPT's row."""
    batch, length = entry.dims[:2]
    tokens = [batch * length / s for s in record["seconds"]]
    found = {"tokens_per_second": tokens}
    peak = next((p for name, p in PEAKS.items() if name in record["device"]), None)
    if peak:
        flops = entry.row().flops
        found["model_flops_utilisation"] = [flops / s / peak for s in record["seconds"]]
    return found


def families() -> list[str]:
    """Names of the modules of test rows."""
    tests = str(Path(__file__).parent.parent / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    cases = importlib.import_module("cases")
    names = (m.name for m in pkgutil.iter_modules(cases.__path__))
    return [n for n in names if n != "case"]


def agreement(family: str, dtype: str, source: dict) -> dict:
    """The largest difference from `jax.vjp` in a family, all its rows compiled as one program."""
    cases = [c for c in importlib.import_module(f"cases.{family}").CASES if dtype in c.dtypes]
    inputs, without = {}, []
    for case in cases:
        try:
            inputs[case.id] = _inputs(case, dtype)
            jax.eval_shape(_both(case), *inputs[case.id])
        except Exception as error:  # of a mesh that this machine has not, of a type it lacks
            inputs.pop(case.id, None)
            without.append(f"{case.id}: {type(error).__name__}")
    runs = {c.id: _both(c) for c in cases if c.id in inputs}
    record = {"row": family, "size": dtype, "kind": "agreement", "against": "jax",
              "rows": len(runs), "without": without, **source}
    try:
        with jax.default_matmul_precision("highest"):
            program = jax.jit(lambda inputs: {n: runs[n](*x) for n, x in inputs.items()})
            found = {n: relative_difference(*pair) for n, pair in program(inputs).items()}
    except Exception as error:
        return {**record, "error": f"{type(error).__name__}: {error}".split("\n")[0]}
    bad = {n: d for n, d in found.items() if not d <= TOLERANCES[dtype]}
    if bad:
        record["error"] = "Disagreement: " + ", ".join(f"{n} {d:.0e}" for n, d in bad.items())
    return {**record, "agreement": max(found.values(), default=0.0)}


def _inputs(case, dtype):
    def cast(x):
        x = jnp.asarray(x)
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    primals = tuple(cast(x) for x in case.values())
    out = jax.eval_shape(case.fun, *primals)
    return primals, random_cotangent(out)


def _both(case):
    """``(primals, cotangent) -> (ours, JAX's)``, cotangents that are numbers."""
    def numbers(cts):
        return [d for d in cts if d.dtype != jax.dtypes.float0]

    return lambda primals, dy: tuple(
        numbers(ad.vjp(case.fun, *primals)[1](dy)) for ad in (fbprop, jax)
    )


def line(record: dict) -> str:
    """A record in words."""
    name = f"{record['row']:<24} {record['size']:<34} {record['against']:<14}"
    if "error" in record:
        return f"{name} FAILED {record['error'][:200]}"
    if "too_large" in record:
        return f"{name} does not fit"
    if record["kind"] == "agreement":
        return f"{name} {record['rows']} rows, largest difference {record['agreement']:.0e}"
    text = f"{name} time {record['time_ratio'][1]:.3f}, {record['seconds'][0] * 1e3:.3f} ms"
    if memory := report.ratios(record).get("memory"):
        text += f", memory {memory:.3f}"
    if "tokens_per_second" in record:
        text += ", {:,.0f} against {:,.0f} tokens/s".format(*record["tokens_per_second"])
    if "model_flops_utilisation" in record:
        text += ", {:.1%} against {:.1%} of peak".format(*record["model_flops_utilisation"])
    return text
