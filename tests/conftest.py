"""Test settings: 8 simulated CPU devices, strict dtype promotion, warnings are errors."""

import os
import pathlib
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little: without optimisation they take a third less time, and again a
# third less by XLA's older emitters of loops, which jaxlib 0.10 still has (test_nn_padding.py and
# test_kfac.py: 21.4 to 12.9 s).
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
) + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")

import functools
import gc
import itertools
import threading

import jax
import pytest
from jax._src.interpreters import mlir

# Tests make millions of objects that live on in JAX's caches; to look through them all every 700
# new ones takes a tenth of the time.
gc.set_threshold(200_000, 50, 1000)

# On JAX 0.10 each lowered program gets an MLIR context of its own, 3 of its 6 ms; on 0.12 one in
# ten does, in 9 ms; here one in a hundred. Internal names, tested on 0.10.2 and 0.12.0.1.
numbers = itertools.count()
new_context = getattr(mlir, "_create_ir_context", mlir.make_ir_context)
context = functools.lru_cache(4)(lambda thread, hundred: new_context())
mlir.make_ir_context = lambda: context(threading.get_ident(), next(numbers) // 100)

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Also of the smallest programs: a fifth of all was compiled before, by this worker or the other.
cache = pathlib.Path(__file__).parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture
def x64():
    """64-bit types for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def caches_kept(monkeypatch):
    """Benchmarks empty JAX's caches: 7 seconds late in a long run, and all is traced once more."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
