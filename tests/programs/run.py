"""One seed: a program is drawn, differentiated, and made small if it disagrees."""

from __future__ import annotations

import jax
import numpy as np

import fbprop

from .compare import SETTINGS, TRANSFORMS, Trial, settings
from .grammar import Drawing
from .shrink import shrunk

NARROW = ("float32", "float32", "float16", "bfloat16", "complex64")
WIDE = ("float64", "float64", "complex128", "float32")


def trial(seed: int, family: str | None = None, ours=fbprop) -> Trial:
    """The trial of a seed: what is differentiated, how, and under which setting.

    Args:
      family: of `grammar.FAMILIES`, to have a line of; ours: whose ``vjp`` is compared with JAX's.
    """
    rng = np.random.default_rng(seed)
    transform = str(rng.choice([*TRANSFORMS]))
    rare = len(SETTINGS) - 2
    setting = str(rng.choice([*SETTINGS], p=[0.3, 0.4, *[0.3 / rare] * rare]))
    with settings(setting):
        wide = jax.config.jax_enable_x64
        drawing = Drawing(rng, WIDE if wide else NARROW, family)
        return Trial(drawing.program(rng.integers(1, 7)), transform, setting, seed, ours)


def look(seed: int, family: str | None = None, ours=fbprop) -> str | None:
    """A report of what disagrees in the program of a seed, or None."""
    found = trial(seed, family, ours)
    if not found.difference():
        return None
    small = shrunk(found)
    return f"{small}\n{small.difference()}"
