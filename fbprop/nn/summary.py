"""A network as a table of its layers."""

from __future__ import annotations

import math

import jax
from jax.tree_util import keystr, tree_leaves_with_path

from fbprop.nn.layer import Layer, watching


def summary(layer: Layer, x) -> str:
    """A table of a network's layers: path, output, parameters, bytes; and the totals.

    Nothing is computed, and the parameters need not exist. A row stands for a layer that contains
    no other, or has parameters besides those of the layers that it contains. Within `repeated` the
    output is one repetition's, the parameters are all's. The paths are those of the parameters, by
    which `fbprop.optim.freeze` and `fbprop.nn.partition` choose.

    Args:
      layer: the network.
      x: an array or a `jax.ShapeDtypeStruct`, as for `Layer.init`.

    Raises:
      TypeError: ``x`` has no shape and dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import nn
      >>> net = nn.sequential(nn.dense(5), nn.relu(), nn.dense(3, bias=False))
      >>> print(nn.summary(net, jax.ShapeDtypeStruct((7, 2), jnp.float32)))
      path     output         parameters  bytes
      dense_0  float32[7, 5]          15     60
      relu     float32[7, 5]           0      0
      dense_1  float32[7, 3]          15     60
      total    float32[7, 3]          30    120
    """
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    outputs = _outputs(layer, params, x)
    owned = _owned(params, outputs)
    inner = {path[:i] for path in outputs for i in range(len(path))}
    rows = [("path", "output", "parameters", "bytes")]
    for path, y in outputs.items():
        if path not in inner or owned[path]:
            rows.append(("/".join(path) or layer.name, _form(y), *_size(owned[path])))
    rows.append(("total", _form(outputs[()]), *_size(jax.tree.leaves(params))))
    if layer.stateful:
        state = jax.eval_shape(lambda: layer.init_state(x))
        rows.append(("state", "", *_size(jax.tree.leaves(state))))
    return _table(rows)


def _outputs(layer, params, x):
    """Path below ``layer`` -> output, in the order in which layers are applied."""
    path, found = [], {}

    def watch(entering, name, y):
        if entering:
            path.append(name)
            found.setdefault(tuple(path[1:]), None)
        else:
            found[tuple(path[1:])] = y if y is None else jax.tree.map(jax.typeof, y)
            path.pop()

    def run(params, x):
        return layer.apply(params, x, state=layer.init_state(x))[0]

    with watching(watch):
        jax.eval_shape(run, params, x)
    return found


def _owned(params, outputs):
    """For each path the parameters that no layer further inside has."""
    owned = {path: [] for path in outputs}
    for key, leaf in tree_leaves_with_path(params):
        names = tuple(keystr((k,), simple=True) for k in key)
        owned[next(names[:i] for i in range(len(names), -1, -1) if names[:i] in owned)].append(leaf)
    return owned


def _form(y):
    forms = [f"{a.dtype.name}{list(a.shape)}" for a in jax.tree.leaves(y)]
    return ", ".join(forms)


def _size(leaves):
    count = sum(math.prod(a.shape) for a in leaves)
    return f"{count:,}", f"{sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves):,}"


def _table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    a, b, c, d = widths
    return "\n".join(f"{p:{a}}  {y:{b}}  {n:>{c}}  {s:>{d}}" for p, y, n, s in rows)
