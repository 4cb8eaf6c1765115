"""The same training steps as users of other libraries write them.

A peer is a module with one function per row it has a version of, named as the row. From our
parameters and batch it returns a function of no arguments that does one step, waits, and returns
the loss before the step.
"""

from __future__ import annotations

import importlib

MODULES = {"flax": "flax_steps", "equinox": "equinox_steps", "torch": "torch_steps",
           "torch.compile": "torch_compiled_steps"}
VIT_HEADS = {8: 2, 64: 4, 192: 6}  # by width, as the row's sizes have it: parameters do not show it


def missing(peers) -> dict[str, str]:
    """Peers that cannot be imported, and why."""
    return {p: str(e) for p in peers if (e := _load(p)[1])}


def step(peer: str, row: str):
    """``(params, batch) -> run`` of a peer, None if it has no version of the row."""
    return getattr(_load(peer)[0], row, None)


def _load(peer):
    try:
        return importlib.import_module(f"benchmarks.peers.{MODULES[peer]}"), None
    except ImportError as error:
        return None, error
