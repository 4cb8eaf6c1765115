"""The machine under the measurements: its own matmul and copy rates, and where a result is from."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time

import jax
import jax.numpy as jnp

PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "equinox", "torch", "opacus",
            "backpack-for-pytorch", "jax-privacy", "kfac-jax")


def best_seconds(run, *args, repeats=20):
    """Shortest of several calls, after one to warm up."""
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def matmul_rate(dtype: str) -> float:
    """Measured floating point operations per second of a square matrix product."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    return 2 * n**3 / best_seconds(jax.jit(jnp.matmul), a, a)


@functools.cache
def copy_rate() -> float:
    """Measured bytes per second, read plus written, of an elementwise pass.

    Over 28 MiB on a CPU: buffers above 32 MiB are page-faulted at every call, which would measure
    the operating system. Over 1 GiB elsewhere.
    """
    x = jnp.zeros((28 if jax.default_backend() == "cpu" else 1024) << 18, jnp.float32)
    return 2 * x.nbytes / best_seconds(jax.jit(lambda x: -x), x)


def provenance() -> dict:
    """Device, threads, versions and commit, as they stand in every line of a results file."""
    device = jax.devices()[0]
    kind = _cpu_name() if device.platform == "cpu" else device.device_kind
    return {
        "device": kind,
        "platform": device.platform,
        "threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := version(p))},
        "commit": _commit(),
    }


def version(package: str) -> str | None:
    """Version of an installed package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name():
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    here = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
