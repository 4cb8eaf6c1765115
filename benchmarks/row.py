"""What a row of the benchmark table is, and the table of rows.

A row is one function: it draws inputs and returns a `Row`. Its parameters after ``draw`` are the
sizes, given in the decorator, one tuple per line of the table::

    @row(smoke=[(4, 8)], small=[(512, 1024)], full=[(4096, 2048)])
    def gelu(draw, B, D):
        return operation(lambda x: jax.nn.gelu(x, approximate=False), [draw.normal(B, D)])
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIZES = ("smoke", "small", "full")


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Attributes:
      build: ``ad -> function of inputs``, where ``ad`` is the module `jax` or `fbprop`; the two
        programs differ in nothing else.
      inputs: arguments of that function.
      probe: arguments for the agreement check, same shapes and dtypes; default ``inputs``.
      flops, bytes: work of one call (forward and backward) if known: arithmetic operations, and
        bytes that any formulation must read or write.
      tolerance: largest relative difference from JAX's results that is agreement.
      jitted: False measures un-jitted calls.
      carries: the first result is the next call's first argument, which is donated.
      places: for several devices, ``array of devices -> (shardings of inputs, of results)``.
      loss: of a whole step, ``(params, *batch) -> scalar``.
      name, size: filled in by the table.
    """

    build: Callable[[Any], Callable]
    inputs: tuple
    probe: tuple | None = None
    flops: float | None = None
    bytes: float | None = None
    tolerance: float = 1e-5
    jitted: bool = True
    carries: bool = False
    places: Callable | None = None
    loss: Callable | None = None
    name: str = ""
    size: str = ""


class Draw:
    """Random inputs, the same at every run."""

    def __init__(self, seed=0):
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape, scale=1.0, dtype=jnp.float32):
        """Array of normal numbers of standard deviation ``scale``."""
        values = self._rng.standard_normal(shape, np.float32) * np.float32(scale)
        return jnp.asarray(values, dtype)

    def weight(self, *shape, dtype=jnp.float32):
        """Array of weights whose last axis is the output: variance 1 / (product of the others)."""
        return self.normal(*shape, scale=np.prod(shape[:-1]) ** -0.5, dtype=dtype)

    def integers(self, high, *shape):
        """Array of int32 in [0, high)."""
        return jnp.asarray(self._rng.integers(0, high, shape, np.int32))


class Entry(NamedTuple):
    """A row's function before its inputs exist: building it may take gigabytes."""

    name: str
    kind: str
    dims: tuple[int, ...]
    make: Callable
    accelerator: bool
    devices: int

    @property
    def size(self):
        names = list(inspect.signature(self.make).parameters)[1:]
        return " ".join(f"{n}{d}" for n, d in zip(names, self.dims, strict=True))

    def row(self) -> Row:
        return replace(self.make(Draw(), *self.dims), name=self.name, size=self.size)


_ENTRIES: dict[str, list[Entry]] = {size: [] for size in SIZES}


def row(kind="operation", accelerator=False, devices=1, **sizes):
    """Decorator: put ``make(draw, *dims) -> Row`` in the table, once per tuple of sizes."""

    def register(make):
        for size, tuples in sizes.items():
            _ENTRIES[size] += [
                Entry(make.__name__, kind, d, make, accelerator, devices) for d in tuples
            ]
        return make

    return register


def named(name: str, like, make):
    """``make(draw, *dims)`` as the row of that name, with the dimensions' names of ``like``."""
    @functools.wraps(like)
    def made(draw, *dims):
        return make(draw, *dims)

    made.__name__ = name
    return made


def entries(size: str) -> list[Entry]:
    """All lines of the table at a size: "smoke", "small" or "full"."""
    return list(_ENTRIES[size])


def operation(function, inputs, fixed=(), ours=None, **figures) -> Row:
    """Value and pullback of ``function(*inputs, *fixed)`` at a random cotangent, w.r.t. inputs.

    Of an operation of `fbprop.ops`, ``function`` is the plain code, which JAX differentiates, and
    ``ours`` the operation. The value is returned and the cotangent is an argument, so neither sweep
    can be optimised away.
    """
    out = jax.eval_shape(function, *inputs, *fixed)
    dy = _cotangent(out.shape, out.dtype)

    def build(ad):
        def run(inputs, fixed, dy):
            y, pullback = ad.vjp(lambda *x: chosen(ad, function, ours)(*x, *fixed), *inputs)
            return y, pullback(dy)

        return run

    return Row(build, (tuple(inputs), tuple(fixed), dy), **figures)


def chosen(ad, plain, ours):
    """Plain code for JAX; for fbprop ``ours``, if there is that."""
    return ours if ours and ad.__name__ == "fbprop" else plain


def _cotangent(shape, dtype):
    # Another seed than the inputs': a normalisation's gradient vanishes where dy equals x.
    return Draw(seed=1).normal(*shape, dtype=dtype)


def looped(function, inputs, fixed, **figures) -> Row:
    """`operation` inside `lax.scan`: value and pullback per element of the leading axis of inputs.

    What a training epoch in one dispatch does; ``fixed`` is the same at every iteration.
    """
    out = jax.eval_shape(function, *(x[0] for x in inputs), *fixed)
    dys = _cotangent((len(inputs[0]), *out.shape), out.dtype)

    def build(ad):
        def run(inputs, fixed, dys):
            def body(_, each):
                x, dy = each
                y, pullback = ad.vjp(lambda *x: function(*x, *fixed), *x)
                return None, (y, pullback(dy))

            return jax.lax.scan(body, None, (inputs, dys))[1]

        return run

    return Row(build, (tuple(inputs), tuple(fixed), dys), **figures)


def loss_gradient(loss, params, fixed=(), ours=None, **figures) -> Row:
    """Value and gradient of the scalar ``loss(params, *fixed)`` with respect to ``params``."""
    build = lambda ad: ad.value_and_grad(chosen(ad, loss, ours))
    return Row(build, (params, *fixed), **figures)
