"""A layout as a table: what lies where, and how many bytes a device holds."""

from __future__ import annotations

import math

import jax
from jax.tree_util import keystr, tree_flatten_with_path

from fbprop.mesh.layouts import Layout, check_layout, is_spec, share, typed


def show(params, layout: Layout, mesh) -> str:
    """A table of parameters: what part of each a device holds, and along which axes it lies.

    Args:
      params: a pytree of arrays, or of shapes and dtypes.
      layout: see `fbprop.mesh.layout`.
      mesh: a `jax.sharding.Mesh` or `AbstractMesh`.

    Raises:
      ValueError, TypeError: as `Layout.specs`; TypeError also for no layout.

    Example:
      >>> import jax
      >>> from fbprop import mesh, nn
      >>> eight = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
      >>> net, x = nn.mlp(16, 3), jax.ShapeDtypeStruct((1, 8), "float32")
      >>> params = jax.eval_shape(lambda: net.init(jax.random.key(0), x))
      >>> print(mesh.show(params, mesh.tensor_parallel(net), eight))
      parameter       whole           on a device    split by       bytes on a device
      dense_0/bias    float32[16]     float32[8]     model                         32
      dense_0/kernel  float32[8, 16]  float32[8, 8]  -, model                     256
      dense_1/bias    float32[3]      float32[3]     -                             12
      dense_1/kernel  float32[16, 3]  float32[8, 3]  model, -                      96
      total of mesh data=4, model=2                                               396
    """
    check_layout(layout)
    params = jax.tree.map(typed, params)
    specs = jax.tree.leaves(layout.specs(mesh, params), is_leaf=is_spec)
    rows = [("parameter", "whole", "on a device", "split by", "bytes on a device")]
    total = 0
    for (path, x), spec in zip(tree_flatten_with_path(params)[0], specs):
        entries = [*spec, *[None] * (x.ndim - len(spec))]
        part = [size // share(mesh, "a layout", axes) for size, axes in zip(x.shape, entries)]
        size = math.prod(part) * x.dtype.itemsize
        total += size
        name = keystr(path, simple=True, separator="/")
        rows.append((name, _form(x, x.shape), _form(x, part), _axes(entries), f"{size:,}"))
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return _table(rows, (f"total of mesh {axes}", f"{total:,}"))


def _form(x, shape):
    return f"{x.dtype.name}[{', '.join(map(str, shape))}]"


def _axes(entries):
    named = [a if isinstance(a, str) else "+".join(a) if a else "-" for a in entries]
    return ", ".join(named) if any(entries) else "-"


def _table(rows, total):
    widths = [max(map(len, column)) for column in zip(*rows)]
    *texts, last = widths
    width = sum(texts) + 2 * len(texts) + last
    lines = ["  ".join([*map(str.ljust, row, texts), row[-1].rjust(last)]) for row in rows]
    return "\n".join([*lines, total[0] + total[1].rjust(max(width - len(total[0]), 1))])
