"""Layouts: which dimension of which parameter lies along which axis of a mesh, as data.

A mesh is JAX's (`jax.make_mesh`), and so is what follows from a layout: `jax.sharding`, from which
XLA finds what devices send each other.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

Axes = str | tuple[str, ...] | None


class Layout:
    """Where parameters lie on a mesh; made by `layout`, `replicated`, `fully_sharded`, ...

    Attributes:
      batch: the mesh's axes that the examples of a batch are split over, a name or several. None,
        or ``"data"`` on a mesh without it: every device works on the whole batch.

    Example: see `layout`.
    """

    def __init__(self, rule: Callable, batch: Axes = "data"):
        """``rule``: ``(mesh, {path: shape and dtype}) -> {path: PartitionSpec}``."""
        self._rule, self.batch = rule, batch

    def specs(self, mesh, params) -> Any:
        """A pytree like ``params`` of `jax.sharding.PartitionSpec`.

        Args:
          mesh: a `jax.sharding.Mesh`, or an `AbstractMesh` where there are no devices.
          params: a pytree of arrays, or of shapes and dtypes.

        Raises:
          ValueError: a parameter whose dimension an axis does not divide, an axis that the mesh
            lacks, a pattern without a parameter or a parameter without a pattern.
          TypeError: no mesh; a spec that does not name axes.
        """
        check_mesh(mesh)
        found, tree = tree_flatten_with_path(jax.tree.map(typed, params))
        named = {keystr(path, simple=True, separator="/"): x for path, x in found}
        specs = self._rule(mesh, named)
        for name, x in named.items():
            check_spec(mesh, name, x, specs[name])
        return tree_unflatten(tree, [specs[name] for name in named])

    def shardings(self, mesh, params) -> Any:
        """As `specs`, of `jax.sharding.NamedSharding`: for `jax.device_put`, `jax.jit`."""
        mesh = automatic(mesh)
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), self.specs(mesh, params), is_leaf=is_spec
        )

    def batch_axes(self, mesh) -> tuple[str, ...]:
        """The axes of ``mesh`` that a batch is split over.

        Raises:
          ValueError: the mesh lacks one.
        """
        if self.batch is None or (self.batch == "data" and "data" not in mesh.axis_names):
            return ()
        axes = _names("the batch", self.batch)
        for axis in axes:
            check_axis(mesh, "the batch", axis)
        return axes


def layout(patterns: Mapping[str, PartitionSpec], batch: Axes = "data") -> Layout:
    """Where parameters lie, by patterns on their paths.

    Args:
      patterns: shell-style pattern on the path (``"encoder/*"``, as in `fbprop.optim.by_path`) ->
        `jax.sharding.PartitionSpec`. The first that matches counts. Dimensions that a spec does
        not reach are whole on every device.
      batch: the mesh's axes that the examples of a batch are split over, a name or several; None:
        each device works on the whole batch. So it does by default on a mesh without ``"data"``.

    Raises:
      TypeError: no dict from strings to specs.   ValueError, once parameters and mesh are known:
      see `Layout.specs`.

    Example:
      >>> import jax
      >>> from fbprop import mesh, nn
      >>> from jax.sharding import PartitionSpec as P
      >>> eight = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
      >>> x = jax.ShapeDtypeStruct((1, 12), "float32")
      >>> params = jax.eval_shape(lambda: nn.dense(6).init(jax.random.key(0), x))
      >>> where = mesh.layout({"*kernel": P("data", "model"), "*": P()})
      >>> {name: tuple(spec) for name, spec in where.specs(eight, params).items()}
      {'bias': (), 'kernel': ('data', 'model')}
    """
    if not isinstance(patterns, Mapping) or not patterns or not all(
        isinstance(p, str) and is_spec(s) for p, s in patterns.items()
    ):
        raise TypeError(
            f"A layout is a dict from patterns to specs, got {patterns!r} expected e.g. "
            '{"*kernel": P("data", None), "*": P()} with P = jax.sharding.PartitionSpec.'
        )
    patterns = dict(patterns)

    def rule(mesh, named):
        for pattern in patterns:
            if not fnmatch.filter(named, pattern):
                raise ValueError(
                    f"A pattern of a layout matches a parameter, got {pattern!r}, which matches "
                    f"none; expected it to match one of {[*named][:20]}."
                )
        return {name: _first(patterns, name) for name in named}

    return Layout(rule, batch)


def replicated(batch: Axes = "data") -> Layout:
    """Every parameter whole on every device, the batch split: data parallelism.

    Args:
      batch: see `layout`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import mesh
      >>> eight = jax.sharding.AbstractMesh((8,), ("data",))
      >>> tuple(mesh.replicated().specs(eight, {"w": jnp.ones((16, 3))})["w"])
      ()
    """
    return Layout(lambda mesh, named: dict.fromkeys(named, PartitionSpec()), batch)


def fully_sharded(axis: Axes = "data", *, within: Layout | None = None,
                  batch: Axes = None) -> Layout:
    """Every device holds a part of each parameter and of its optimiser state (FSDP, ZeRO-3).

    Of each parameter the largest dimension that the axis divides is split over it; one without
    such a dimension is whole on every device. Rajbhandari et al. 2020, arXiv:1910.02054.

    Args:
      axis: the mesh's axis, or several, which count as one.
      within: another layout, such as `tensor_parallel`; what it leaves whole of a dimension is
        split here.
      batch: see `layout`; default: ``axis``.

    Raises:
      TypeError: ``within`` is no layout.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import mesh
      >>> eight = jax.sharding.AbstractMesh((8,), ("data",))
      >>> specs = mesh.fully_sharded().specs(eight, {"w": jnp.ones((16, 3)), "b": jnp.ones(3)})
      >>> tuple(specs["w"]), tuple(specs["b"])
      (('data',), ())
    """
    check_layout(within, none=True)
    base = replicated() if within is None else within

    def rule(mesh, named):
        specs = base._rule(mesh, named)
        n = share(mesh, "a fully sharded layout", axis)
        return {name: _split_largest(x.shape, specs[name], axis, n) for name, x in named.items()}

    return Layout(rule, axis if batch is None else batch)


def automatic(mesh):
    """The mesh with axes of type Auto: XLA finds what is sent, layers name no shardings."""
    kind = type(mesh)
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, Mesh):
        return kind(mesh.devices, mesh.axis_names, axis_types=types)
    return kind(mesh.axis_sizes, mesh.axis_names, axis_types=types)


def is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)


def typed(x):
    """A leaf with a shape and a dtype: a number has none by itself."""
    return x if hasattr(x, "shape") and hasattr(x, "dtype") else jax.typeof(x)


def share(mesh, what: str, axes) -> int:
    """Into how many parts axes (a name, several, or None) split a dimension."""
    axes = _names(what, axes)
    for axis in axes:
        check_axis(mesh, what, axis)
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))


def check_mesh(mesh) -> None:
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(
            f"A layout is for a mesh, got mesh={mesh!r} expected a jax.sharding.Mesh: "
            "jax.make_mesh((8,), ('data',)), say."
        )


def check_layout(layout, none: bool = False) -> None:
    """Raises unless it is a layout; ``none``: or None."""
    if not (isinstance(layout, Layout) or (none and layout is None)):
        raise TypeError(
            f"Where parameters lie is a layout's say, got {layout!r} expected what "
            "fbprop.mesh.layout, replicated, fully_sharded or tensor_parallel returns"
            f"{', or None' if none else ''}."
        )


def check_axis(mesh, what: str, axis: str) -> None:
    if axis not in mesh.axis_names:
        raise ValueError(
            f"A layout names axes of the mesh, got {axis!r} for {what} expected one of "
            f"{mesh.axis_names}: jax.make_mesh((4, 2), ('data', 'model')) names them."
        )


def check_spec(mesh, name: str, x, spec) -> None:
    """Raises unless every device gets an equal part of a parameter."""
    what = f"parameter {name!r} of {x.dtype}[{','.join(map(str, x.shape))}]"
    if len(spec) > x.ndim:
        raise ValueError(
            f"A spec has at most one entry per dimension, got {spec} for {what}, expected "
            f"{x.ndim} or fewer: put a narrower pattern before the one that matched."
        )
    used = []
    for d, axes in enumerate(spec):
        n = share(mesh, what, axes)
        used += _names(what, axes)
        if x.shape[d] % n:
            raise ValueError(
                f"Every device gets an equal part, got {what}, whose dimension {d} axis {axes!r} "
                f"of {n} devices does not divide; expected a multiple of {n}: pad it, or split "
                "another dimension."
            )
    if len(set(used)) < len(used):
        raise ValueError(
            f"An axis splits one dimension of a parameter, got {spec} for {what}; expected each "
            "axis once."
        )


def _names(what: str, axes) -> tuple[str, ...]:
    """Axes as a tuple of their names."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"An axis of a mesh is a name, got {axes!r} for {what} expected a string, several in a "
            "tuple, or None."
        )
    return tuple(names)


def _first(patterns, name):
    for pattern, spec in patterns.items():
        if fnmatch.fnmatchcase(name, pattern):
            return spec
    raise ValueError(
        f"Every parameter has a place, got {name!r}, which no pattern matches; expected a match: "
        "add '*': P() as the last pattern to have the rest whole on every device."
    )


def _split_largest(shape, spec, axis, n):
    whole = [*spec, *[None] * (len(shape) - len(spec))]
    free = [d for d in range(len(shape)) if whole[d] is None and shape[d] % n == 0 and shape[d]]
    if not free:
        return spec
    largest = max(free, key=lambda d: shape[d])
    whole[largest] = axis
    while whole and whole[-1] is None:
        whole.pop()
    return PartitionSpec(*whole)
