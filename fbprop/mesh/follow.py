"""Where an optimiser's state lies: with the parameters that its arrays belong to."""

from __future__ import annotations

from typing import Any

from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from fbprop.mesh.layouts import Layout, automatic, is_spec


def following(layout: Layout, mesh, params, tree) -> Any:
    """Shardings of arrays that belong to parameters, such as an optimiser's state.

    What lies in ``tree`` under a parameter's path, such as ``mu/dense/kernel``, and has its shape,
    lies as the parameter does; what has one dimension less, as its means over rows or columns, is
    split as the dimensions that are left. All else (counts, factors) is whole on every device.

    Args:
      layout, mesh, params: as for `Layout.shardings`.
      tree: a pytree of arrays, or of shapes and dtypes.

    Returns:
      A pytree like ``tree`` of `jax.sharding.NamedSharding`.

    Example:
      >>> import jax
      >>> from fbprop import optim
      >>> from fbprop.mesh.follow import following
      >>> from fbprop.mesh.layouts import fully_sharded
      >>> eight = jax.sharding.AbstractMesh((8,), ("data",))
      >>> params = {"w": jax.ShapeDtypeStruct((16, 3), "float32")}
      >>> state = jax.eval_shape(optim.sgd(0.1, momentum=0.9).init, params)
      >>> places = following(fully_sharded(), eight, params, state)
      >>> [tuple(place.spec) for place in jax.tree.leaves(places)]
      [(), ('data',)]
    """
    shapes = {_keys(path): x.shape for path, x in tree_flatten_with_path(params)[0]}
    specs = tree_flatten_with_path(layout.specs(mesh, params), is_leaf=is_spec)[0]
    owners = {_keys(path): (shapes[_keys(path)], spec) for path, spec in specs}
    found, structure = tree_flatten_with_path(tree)
    mesh = automatic(mesh)
    return tree_unflatten(structure, [
        NamedSharding(mesh, _spec(owners, _keys(path), x.shape)) for path, x in found
    ])


def _keys(path) -> tuple[str, ...]:
    return tuple(keystr((key,), simple=True) for key in path)


def _spec(owners, path, shape):
    for start in range(len(path) + 1):  # the longest end of the path that is a parameter's
        if (owner := owners.get(path[start:])) is not None:
            return _fitted(*owner, shape)
    return PartitionSpec()


def _fitted(owner, spec, shape):
    if shape == owner:
        return spec
    entries = [*spec, *[None] * (len(owner) - len(spec))]
    for d in range(len(owner)):
        if shape == (*owner[:d], *owner[d + 1:]):
            return PartitionSpec(*entries[:d], *entries[d + 1:])
    return PartitionSpec()
