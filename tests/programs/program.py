"""A program: inputs with types, lines of Python source, and what it returns."""

from __future__ import annotations

import functools
import re
import textwrap
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import sparse


class Type(NamedTuple):
    """Shape and dtype of an input; ``scale`` and ``shift`` of the numbers in it.

    A weak type is a Python number: its shape is ``()``.
    """

    shape: tuple[int, ...]
    dtype: str
    scale: float = 1.0
    shift: float = 0.0
    weak: bool = False

    def draw(self, rng):
        kind = np.dtype(jnp.dtype(self.dtype)).kind
        if kind in "iu":
            value = rng.integers(0, 3, self.shape)
        elif kind == "b":
            value = rng.integers(0, 2, self.shape)
        else:
            value = rng.standard_normal(self.shape) * self.scale + self.shift
            if kind == "c":
                value = value + 1j * rng.standard_normal(self.shape)
        if self.weak:
            return value.item() if hasattr(value, "item") else value
        return jax.device_put(np.asarray(value).astype(jnp.dtype(self.dtype)))


@dataclass(frozen=True)
class Line:
    """``target = expression``; ``blocks`` are functions that the expression calls, by name."""

    target: str
    expression: str
    blocks: tuple[Program, ...] = ()


@dataclass(frozen=True)
class Program:
    """``def name(inputs): lines; return results``.

    Attributes:
      inputs: name -> `Type`; of an inner function, name -> None.
      lines: in order.
      results: what is returned: expressions.
      enclosing: names of an outer function that it may read.
    """

    name: str
    inputs: dict[str, Type | None]
    lines: tuple[Line, ...] = ()
    results: tuple[str, ...] = ()
    enclosing: tuple[str, ...] = field(default=())

    def source(self) -> str:
        body = []
        for line in self.lines:
            body += [block.source() for block in line.blocks]
            body.append(f"{line.target} = {line.expression}")
        body.append(f"return {', '.join(self.results)}" + "," * (len(self.results) == 1))
        head = f"def {self.name}({', '.join(self.inputs)}):"
        return "\n".join((head, textwrap.indent("\n".join(body), "    ")))

    def function(self, source=None):
        """The program as a Python function of its inputs, returning a tuple."""
        namespace = dict(NAMES)
        exec(compile(source or self.source(), f"<{self.name}>", "exec"), namespace)
        return namespace[self.name]

    def primals(self, seed=0):
        rng = np.random.default_rng(seed)
        return [t.draw(rng) for t in self.inputs.values()]

    def needed(self) -> Program:
        """The program without the lines and inputs that its results do not need."""
        wanted, lines = names_in(" ".join(self.results)), []
        for line in reversed(self.lines):
            if line.target in wanted:
                wanted |= names_in(line.expression).union(*(b.reads() for b in line.blocks))
                lines.append(line)
        inputs = {n: t for n, t in self.inputs.items() if t is None or n in wanted}
        inputs = inputs or dict(list(self.inputs.items())[:1])
        return replace(self, lines=tuple(reversed(lines)), inputs=inputs)

    def reads(self) -> set[str]:
        return names_in(self.source()) - {self.name}

    def size(self) -> int:
        return len(self.results) + sum(
            1 + sum(block.size() for block in line.blocks) for line in self.lines
        )


def names_in(source):
    return set(re.findall(r"\b[a-z]\d+\b", source))


def like(x, c):
    """Something that depends on ``x`` and has the type of ``c``: what a loop carries."""
    x = jnp.mean(x) if x.size else jnp.zeros((), x.dtype)
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(c):
        x = jnp.real(x)
    return jnp.broadcast_to(x, c.shape).astype(c.dtype) + c


def sparse_times(x, y):
    """A sparse matrix of two elements of ``x`` times ``y``, of one type: of two, JAX errs."""
    elements = jnp.real(x).reshape(-1)[:2].astype(y.dtype)
    return sparse.BCOO((elements, np.array([[0, 1], [2, 0]])), shape=(3, 2)) @ y


def total(x):
    """A number that depends on every element of ``x``, smooth and not of one size."""
    weights = np.arange(1.0, x.size + 1).reshape(x.shape) / max(x.size, 1)
    return jnp.sum(jnp.sin(x) * jnp.asarray(weights).astype(x.dtype))


@jax.custom_jvp
def doubled(x):
    return 2 * x


# Linear in its argument, so its derivative is itself: as implicit functions are written.
doubled.defjvp(lambda p, t: (doubled(*p), doubled(*t)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scaled(x, by):
    return x * by


scaled.defvjp(lambda x, by: (x * by, None), lambda by, _, d: (d * (by + 1),))

NAMES = {
    "jax": jax, "jnp": jnp, "np": np, "lax": lax, "sparse": sparse, "partial": functools.partial,
    "EYES": np.eye(3) + np.eye(3, k=1),
    "policies": jax.checkpoint_policies, "preset": lax.DotAlgorithmPreset, "like": like,
    "sparse_times": sparse_times, "total": total, "doubled": doubled, "scaled": scaled,
}
