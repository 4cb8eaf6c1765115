"""Accelerators that need not be there: XLA compiles whole programs for a device's description."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

DESCRIPTION = Path(__file__).parent / "h100.txt"


class Target(NamedTuple):
    """A device to compile for.

    Attributes:
      device: its name in words.
      extra: the optional extra of the project that installs its compiler; module, package: what it
        is then found by, and what its version is of.
      environment: what must be set before JAX is imported; flags: added to ``XLA_FLAGS``.
      topology: arguments of `jax.experimental.topologies.get_topology_desc`.
    """

    device: str
    extra: str
    module: str
    package: str
    environment: dict
    topology: dict
    flags: str = ""


TARGETS = {
    "h100": Target(
        "NVIDIA H100 SXM 80 GB", "target-h100", "jax_cuda12_plugin", "jax-cuda12-plugin",
        {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
        {"platform": "cuda", "topology_name": "h100", "topology": "1x1x1",
         "target_config": DESCRIPTION.read_text()},
        "--xla_gpu_autotune_level=0",  # autotuning runs kernels
    ),
    "v5e": Target(
        "TPU v5e", "target-v5e", "libtpu", "libtpu",
        {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
         "TPU_WORKER_HOSTNAMES": "localhost",
         "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},  # nothing runs: no lock, which would stay in /tmp
        {"platform": "tpu", "topology_name": "v5e:2x2"},
    ),
}


# Several devices of a kind: what else is said to XLA, by the name after the colon.
SEVERAL = {
    "v5e:4x4": {"topology_name": "v5e:4x4"},
    "h100:8": {"topology": "1x1x8"},
}


def kind(name: str) -> str:
    """The device of a target: of several, that of each."""
    return name.partition(":")[0]


def prepare(name: str) -> None:
    """Set the environment for a target, before JAX is imported.

    Exits with a sentence if there is no such target or its compiler is not installed.
    """
    if name not in (*TARGETS, *SEVERAL):
        sys.exit(f"--target is one of {', '.join((*TARGETS, *SEVERAL))}, got {name!r}.")
    target = TARGETS[kind(name)]
    if importlib.util.find_spec(target.module) is None:
        sys.exit(f"--target {name} needs XLA's compiler for the {target.device}, got no module "
                 f"{target.module}: pip install '.[{target.extra}]'.")
    os.environ.update(target.environment, JAX_PLATFORMS="cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {target.flags}".strip()


def devices(name: str) -> list:
    """The devices of a target, to compile for; see `prepare`. Of a single one, the first."""
    from jax.experimental import topologies

    several = SEVERAL.get(name, {})
    found = topologies.get_topology_desc(**{**TARGETS[kind(name)].topology, **several}).devices
    return found if several else found[:1]


def compiler(name: str) -> str:
    """Package and version of what compiles for a target."""
    package = TARGETS[kind(name)].package
    return f"{package} {importlib.metadata.version(package)}"
