"""Batches from the host to the devices of a mesh, each process's part to its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fbprop.mesh.layouts import Layout, automatic, check_layout, check_mesh, replicated, share


def feed(batch, mesh, layout: Layout | None = None) -> Any:
    """A batch split over the devices of a mesh, as `fbprop.train.step` takes it.

    With several processes, each hands over its own part of the batch: the examples for its own
    devices, in the order of the mesh, as many for each device as in the other processes, which
    nobody checks. `fbprop.train.fit` calls it.

    Args:
      batch: a pytree of arrays with the examples along their first axis; numbers go everywhere.
      mesh: a `jax.sharding.Mesh`.
      layout: its ``batch`` says over which axes; None: `replicated`.

    Returns:
      The pytree, of global arrays.

    Raises:
      ValueError: the axes do not divide the number of examples.   TypeError: no mesh or layout.

    Example:
      >>> import jax, numpy as np
      >>> from fbprop import mesh
      >>> devices = jax.make_mesh((jax.device_count(),), ("data",))
      >>> batch = mesh.feed({"x": np.zeros((jax.device_count(), 3))}, devices)
      >>> batch["x"].sharding.spec == jax.sharding.PartitionSpec("data")
      True
    """
    check_mesh(mesh)
    check_layout(layout, none=True)
    return jax.tree.map(Feed(mesh, replicated() if layout is None else layout).local, batch)


class Feed:
    """Puts arrays on the devices of a mesh, the examples of a batch along its axes for them."""

    def __init__(self, mesh, layout: Layout):
        self.mesh, self.axes = automatic(mesh), layout.batch_axes(mesh)
        self.parts = share(mesh, "the batch", self.axes)

    def sharding(self, x, lead: int = 0) -> NamedSharding:
        """Of an array whose examples are along the axis after ``lead`` others."""
        if np.ndim(x) <= lead or not self.axes:
            return NamedSharding(self.mesh, PartitionSpec())
        return NamedSharding(self.mesh, PartitionSpec(*[None] * lead, self.axes))

    def check(self, examples: int) -> None:
        if examples % self.parts:
            raise ValueError(
                f"Every device gets equally many examples, got a batch of {examples} for axes "
                f"{self.axes} of {self.parts} devices, expected a multiple of {self.parts}: take "
                "another batch size (of each piece, with accumulate), leave a shorter last batch "
                "out, or name another axis with the layout's batch=."
            )

    def local(self, x, lead: int = 0) -> jax.Array:
        """An array of which each process has its own part."""
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        sharding = self.sharding(x, lead)
        if jax.process_count() == 1:
            if np.ndim(x) > lead:
                self.check(np.shape(x)[lead])
            return jax.device_put(x, sharding)
        self.check_local(np.shape(x), sharding, lead)
        return jax.make_array_from_process_local_data(sharding, host(x))

    def check_local(self, shape, sharding, lead):
        """As `check`, of what one of several processes has."""
        if len(shape) > lead:
            mine = sharding.addressable_devices_indices_map((*[1] * lead, self.parts))
            self.check_part(shape[lead], len({i[lead].indices(self.parts) for i in mine.values()}))

    def check_part(self, examples, parts):
        if examples % parts:
            raise ValueError(
                f"Every device gets equally many examples, got {examples} in process "
                f"{jax.process_index()} for {parts} parts, expected a multiple of {parts}."
            )

    def each(self, batches) -> Callable:
        """A function that returns batches, or what a function of that name returns, one by one."""
        def of():
            for batch in batches() if callable(batches) else batches:
                yield jax.tree.map(self.local_or_whole, batch)

        return of

    def local_or_whole(self, x) -> jax.Array:
        """As `local`; what one process has and the axes do not divide is whole on every device."""
        if jax.process_count() == 1 and np.ndim(x) and np.shape(x)[0] % self.parts:
            return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec()))
        return self.local(x)

    def in_order(self, data, examples: int, size: int) -> Callable:
        """A function that returns arrays in batches, a shorter last one whole on every device."""
        data = jax.tree.map(np.asarray, data)

        def of():
            for start in range(0, examples, size):
                rows = np.arange(start, min(start + size, examples))
                yield jax.tree.map(lambda x: self.rows(x, rows), data)

        return of

    def rows(self, x: np.ndarray, rows: np.ndarray) -> jax.Array:
        """Rows [..., batch] of an array that every process has; each reads those for itself."""
        lead = rows.ndim - 1
        divides = rows.shape[lead] % self.parts == 0
        spec = PartitionSpec(*[None] * lead, self.axes or None) if divides else PartitionSpec()
        return jax.make_array_from_callback(
            (*rows.shape, *x.shape[1:]), NamedSharding(self.mesh, spec),
            lambda index: host(x[rows[index[:lead + 1]]])[(..., *index[lead + 1:])],
        )


def host(x) -> np.ndarray:
    """An array on the host, of a dtype that JAX has."""
    return np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))
