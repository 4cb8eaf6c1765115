"""The same training steps, and gradients per example, as users of other libraries write them.

A peer's version of a row is a function, named as the row, in one of its modules: from our
parameters and batch it returns a function of no arguments that does one step, waits, and returns
the loss before the step; of a row that is no step, the row's result.
"""

from __future__ import annotations

import importlib


def _modules(name):
    return [f"{name}_{kind}_steps" for kind in ("image", "sequence", "other")]


MODULES = {"flax": _modules("flax"), "equinox": _modules("equinox"), "torch": _modules("torch"),
           "torch.compile": ["torch_compiled_steps"], "opacus": ["opacus_per_example"],
           "backpack": ["backpack_per_example"], "jax-privacy": ["jax_privacy_per_example"],
           "kfac-jax": ["kfac_jax_steps"]}
VIT_HEADS = {8: 2, 64: 4, 192: 6}  # by width, as the row's sizes have it: parameters do not show it


def missing(peers) -> dict[str, str]:
    """Peers that cannot be imported, and why."""
    return {p: str(e) for p in peers if (e := _load(p)[1])}


def step(peer: str, row: str):
    """``(params, batch) -> run`` of a peer, None if it has no version of the row."""
    return next((found for m in _load(peer)[0] if (found := getattr(m, row, None))), None)


def _load(peer):
    try:
        return [importlib.import_module(f"benchmarks.peers.{m}") for m in MODULES[peer]], None
    except ImportError as error:
        return [], error
