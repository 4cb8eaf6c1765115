"""The form of a test row, and the operands rows are written with.

A row says what to differentiate and where; the checks are written once, in test_rules.py, and run
for every row. Shapes are small primes, so that a transposed or mixed-up dimension cannot fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class Case:
    """One row.

    Attributes:
      name: the rule's name in the table; the traced function must use it.
      fun: function of the operands, written with lax / jax.numpy.
      operands: one spec each, see below; called with a NumPy generator, they give float64.
      evaluated: XLA computes the checks as it compiles them; False where that takes longer than
        to make code, as it does for windows.
      plain: the same in plain code, of an operation; what JAX differentiates in its place.
      label: tells rows of the same name apart.
      at: special points: (operands, {operand index: expected cotangent for ȳ = 1}) in float64.
      dtypes: the lower precisions checked against float64.
      order: 2, or 1 where JAX itself has no second derivative (which is then checked).
      differences: whether finite differences apply (not at kinks, not for surrogate derivatives).
      vmap: False where JAX itself cannot batch the primitive (which is then checked).
      kept: bytes kept in float64 with all operands active; needed where the rule's own signature
        does not declare it (a rule with a forward of its own, or about inner equations).
      tolerance: {"jax" | "differences" | dtype: relative tolerance}, each with ``why``.
    """

    name: str
    fun: Callable
    operands: tuple
    label: str = ""
    at: tuple = ()
    dtypes: tuple[str, ...] = FLOATS
    order: int = 2
    differences: bool = True
    vmap: bool = True
    kept: int | None = None
    tolerance: dict = field(default_factory=dict)
    why: str = ""
    plain: Callable | None = None
    evaluated: bool = True

    def __post_init__(self):
        if bool(self.tolerance) != bool(self.why):
            raise ValueError(f"{self.id}: a tolerance override comes with its reason, and only so")

    @property
    def id(self):
        return f"{self.name}-{self.label}" if self.label else self.name

    def values(self, seed=0):
        rng = np.random.default_rng(seed)
        return tuple(spec(rng) for spec in self.operands)


def real(*shape, scale=1.0):
    """Standard normal."""
    return lambda rng: scale * rng.standard_normal(shape)


def between(low, high, *shape):
    """Uniform in [low, high)."""
    return lambda rng: rng.uniform(low, high, shape)


def positive(*shape):
    """Uniform in [0.5, 2)."""
    return between(0.5, 2.0, *shape)


def apart(*shape):
    """Elements at least 0.4 apart and 0.2 from any multiple of 0.5: no ties, no kinks."""

    def spec(rng):
        n = int(np.prod(shape))
        steps = rng.permutation(n) - n // 2
        return (0.25 + 0.5 * steps + 0.05 * rng.uniform(-1, 1, n)).reshape(shape)

    return spec


def complex_(*shape):
    """Standard normal real and imaginary parts."""
    return lambda rng: rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def integers(low, high, *shape):
    """int32 in [low, high)."""
    return lambda rng: rng.integers(low, high, shape).astype(np.int32)


def booleans(*shape):
    return lambda rng: rng.integers(0, 2, shape).astype(bool)


def exactly(value, dtype=None):
    """This array."""
    return lambda rng: np.asarray(value, dtype)


def definite(n, *batch):
    """Symmetric positive definite, well conditioned."""

    def spec(rng):
        a = rng.standard_normal((*batch, n, n))
        return a @ np.swapaxes(a, -1, -2) + n * np.eye(n)

    return spec
