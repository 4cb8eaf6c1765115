"""What was seen of the watched values, forward and backward: a pytree that can be read as rows."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbprop.watch.points import Point


def flowed(x: jax.Array) -> jax.Array:
    """1: there was a value, which of a branch that is not taken there is not."""
    return jnp.ones((), "float32")


@jax.tree_util.register_pytree_node_class
class Report:
    """Statistics of values and of their cotangents, by path and equation.

    A pytree of small arrays: it may be returned by a jitted function, stacked by `jax.lax.scan`,
    and averaged. Inside a loop the arrays have its steps in front, under `jax.vmap` the examples.

    Attributes:
      points: what was watched, in the order of the program.
      names: of the statistics.
      values, cotangents: per point a dict from name to array.
    """

    def __init__(self, points: tuple[Point, ...], names: tuple[str, ...], values, cotangents):
        self.points, self.names = points, names
        self.values, self.cotangents = values, cotangents

    def tree_flatten(self):
        return (self.values, self.cotangents), (self.points, self.names)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*static, *children)

    def rows(self) -> list[dict[str, Any]]:
        """A dict per point: ``path``, ``primitive``, ``line``, ``type``, ``steps`` (lengths of the
        loops around it), and ``value`` and ``cotangent``: per statistic a number, or lists of them
        (a loop's steps). They are None of a branch that was not taken, and of steps in which
        nothing came.
        """
        values, cotangents = jax.device_get((self.values, self.cotangents))
        return [
            {
                "path": p.path, "primitive": p.primitive, "line": p.line,
                "type": f"{p.dtype}[{','.join(map(str, p.shape))}]", "steps": list(p.steps),
                "value": _numbers(v, self.names), "cotangent": _numbers(d, self.names),
            }
            for p, v, d in zip(self.points, values, cotangents)
        ]

    def table(self) -> str:
        """The rows as text: of a loop's steps the least and the largest number."""
        head = ["path", "primitive", "type", *self.names, *(f"d {n}" for n in self.names)]
        lines = [head]
        for row in self.rows():
            steps = "".join(f"{n} x " for n in row["steps"])
            cells = [row["path"], row["primitive"], steps + row["type"]]
            both = row["value"], row["cotangent"]
            lines.append(cells + [_text(d[n]) for d in both for n in self.names])
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            "  ".join(
                c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))
            ).rstrip()
            for line in lines
        )

    def __str__(self):
        return self.table()

    def __repr__(self):
        return f"<fbprop report of {', '.join(self.names)} at {len(self.points)} points>"


def _numbers(found, names):
    came = np.asarray(found[flowed.__name__]) != 0
    out = {}
    for name in names:
        x = np.asarray(found[name])
        there = np.broadcast_to(came.reshape(came.shape + (1,) * (x.ndim - came.ndim)), x.shape)
        out[name] = np.where(there, x.astype(object), None).tolist()
    return out


def _text(x):
    flat = [v for v in np.ravel(np.array(x, dtype=object)) if v is not None]
    if not flat:
        return "-"
    if any(isinstance(v, float) and math.isnan(v) for v in flat):
        return "nan"
    if any(isinstance(v, complex) for v in flat):
        return f"{flat[0]:.3g}"
    low, high = f"{min(flat):.3g}", f"{max(flat):.3g}"
    return low if low == high else f"{low}..{high}"
