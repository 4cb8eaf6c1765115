"""Cotangents carried unevaluated: products of two factors, and a few rows of a table.

A weight's cotangent is a contraction of its input with the cotangent of its output; a table's is
zero but for the rows that were looked up. A rule may return either form. It is evaluated at once
unless whoever gets it has said that it takes factors: a loop, which does one product for many
steps instead of a small one, and a full-size sum, per step; a rule that can do with the rows alone;
a user who asked for them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.core.devices import at_lowering, by_devices, by_platform
from fbprop.core.opaque import held
from fbprop.core.scatter import are_whole_rows, is_one_each, merged, one_each, scatter_add

AT_HAND = 2**26  # bytes of a table that still lies in the vector memory of a TPU, with others
_UNORDERED = {"indices_are_sorted": False, "unique_indices": False}


class Factored:
    """Base of the forms: ``shape``, ``dtype``, ``dense()`` and ``add_to(array)``."""

    def __repr__(self):
        return f"<{type(self).__name__} {jnp.dtype(self.dtype).name}{list(self.shape)}>"

    def add_to(self, total: jax.Array) -> jax.Array:
        """``total`` and this."""
        return lax.add(total, self.dense())


def is_factored(x) -> bool:
    return isinstance(x, Factored)


def dense(tree):
    """A pytree of cotangents with arrays in place of unevaluated ones."""
    return jax.tree.map(lambda x: x.dense() if is_factored(x) else x, tree, is_leaf=is_factored)


@jax.tree_util.register_pytree_node_class
class Contraction(Factored):
    """The product of two arrays summed over some of their dimensions, not yet done.

    Attributes:
      x, y: the factors.
      over: dimensions of x, and of y, that are summed over.
      batch: dimensions of x, and of y, that they share.
      order: the product has the batch dimensions, then the remaining ones of x, then of y;
        dimension i of it is dimension ``order[i]`` of the cotangent.
      options: of `jax.lax.dot_general`.

    Example:
      >>> import fbprop, jax.numpy as jnp
      >>> x, w = jnp.ones((5, 2)), jnp.ones((2, 3))
      >>> _, pullback = fbprop.vjp(lambda w: x @ w, w, factored=True)
      >>> (dw,) = pullback(jnp.ones((5, 3)))
      >>> dw.x.shape, dw.y.shape, dw.dense().tolist()
      ((5, 2), (5, 3), [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]])
    """

    def __init__(self, x, y, over, batch, order: Sequence[int], options: dict[str, Any]):
        self.x, self.y, self.over, self.batch = x, y, _frozen(over), _frozen(batch)
        self.order, self.options = tuple(order), options

    def tree_flatten(self):
        return (self.x, self.y), (self.over, self.batch, self.order, tuple(self.options.items()))

    @classmethod
    def tree_unflatten(cls, static, factors):
        *dims, options = static
        return cls(*factors, *dims, dict(options))

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [self.x.shape[d] for d in self.batch[0]]
        sizes += [f.shape[d] for i, f in enumerate((self.x, self.y)) for d in self._free(i)]
        return tuple(sizes[i] for i in np.argsort(self.order))

    @property
    def dtype(self):
        preferred = self.options.get("preferred_element_type")
        return jnp.dtype(preferred or _product_dtype(self.x.dtype, self.y.dtype))

    def _free(self, i):
        used = (*self.over[i], *self.batch[i])
        return [d for d in range((self.x, self.y)[i].ndim) if d not in used]

    def dense(self) -> jax.Array:
        """The cotangent as an array.

        Summed dimensions that follow one another are made one first, where shardings do not forbid
        it: x̄ᵀȳ over 4096 = 16 · 256 positions to 256 x 1024 takes 21 ms that way, 22 ms over two
        dimensions, because XLA copies x then (one core, float32). For a TPU it copies what is
        merged: ``vit_step`` takes 1.27 of the memory so and moves 1.15, otherwise 1.06 and 1.07.
        """
        if self.formulation():
            return by_platform(self, cpu=_turned, default=Contraction._in_order)
        return self._in_order()

    def _in_order(self, hold=lambda out: out):
        out = self._product()
        in_order = list(self.order) == sorted(self.order)
        return out if in_order else lax.transpose(hold(out), np.argsort(self.order))

    def _product(self):
        merges = "out_sharding" not in self.options and all(map(_consecutive, self.over))
        if not merges:
            return self._over_all(self.x, self.y)
        return by_devices(self.x, self.y, one=self._over_merged, several=self._over_all,
                          apart_from=("tpu",))

    def _over_all(self, x, y):
        return lax.dot_general(x, y, (self.over, self.batch), **self.options)

    def _over_merged(self, x, y):
        x, over_x, batch_x = _merged(x, self.over[0], self.batch[0])
        y, over_y, batch_y = _merged(y, self.over[1], self.batch[1])
        return lax.dot_general(x, y, ((over_x, over_y), (batch_x, batch_y)), **self.options)

    def formulation(self) -> str:
        """Which way the product is computed on CPUs: "turned", a wide one and a transpose, or "".

        XLA's product on CPUs of factors that are summed over their leading dimensions is slower
        where the result is tall: over 2048 to 1024 x 256 it takes 16.2 ms, the other way round and
        transposed 11.3; over 4096 to 256 x 96 2.8 and 2.2; but over 256 to 1024 x 256 2.0 and 2.2
        (one core, float32).
        """
        terms, *sizes = [math.prod(self.x.shape[d] for d in self.over[0]), *self._sizes()]
        possible = (
            not self.batch[0] and "out_sharding" not in self.options and self.dtype == jnp.float32
            and all(list(dims) == list(range(len(dims))) for dims in self.over)
        )
        uneven = terms >= 1024 and min(sizes) > 1 and max(sizes) >= 1.25 * min(sizes)
        order = self._wide().order if possible and uneven else ()
        return "" if list(order) == sorted(order) else "turned"

    def _sizes(self):
        """Sizes of what is left of either factor."""
        factors = enumerate((self.x, self.y))
        return [math.prod(f.shape[d] for d in self._free(i)) for i, f in factors]

    def _wide(self):
        """The same, the larger factor the second; for one without batch dimensions."""
        first, second = self._sizes()
        n = len(self._free(0))
        return self if first <= second else Contraction(
            self.y, self.x, self.over[::-1], self.batch, [*self.order[n:], *self.order[:n]],
            self.options | {"precision": exchanged(self.options.get("precision"))},
        )

    def transposed(self, permutation: Sequence[int]) -> Contraction:
        """`jax.lax.transpose` of the cotangent, as a contraction."""
        order = np.argsort(permutation)[list(self.order)]
        return Contraction(self.x, self.y, self.over, self.batch, order.tolist(), self.options)

    def over_steps(self, x, y) -> Contraction:
        """The sum of this contraction over the first axis, which both x and y have besides."""
        over = [(0, *_shifted(dims)) for dims in self.over]
        batch = [_shifted(dims) for dims in self.batch]
        return Contraction(x, y, over, batch, self.order, self.options)

    def each_step(self, x, y, which: int) -> Contraction:
        """This contraction for every index of the first axis, which x (0) or y (1) has besides."""
        over, batch = [[*dims] for dims in self.over], [[*dims] for dims in self.batch]
        over[which], batch[which] = _shifted(over[which]), _shifted(batch[which])
        # In the product, the new axis is the first of the remaining ones of its factor.
        at = len(batch[0]) + which * (x.ndim - len(over[0]) - len(batch[0]))
        order = [d + 1 for d in self.order]
        return Contraction(x, y, over, batch, [*order[:at], 0, *order[at:]], self.options)


@jax.tree_util.register_pytree_node_class
class Sums(Factored):
    """An array summed over some of its dimensions, in another shape: not yet done."""

    def __init__(self, x, axes, shape):
        self.x, self.axes, self.shape = x, tuple(axes), tuple(shape)

    def tree_flatten(self):
        return (self.x,), (self.axes, self.shape)

    @classmethod
    def tree_unflatten(cls, static, arrays):
        return cls(*arrays, *static)

    @property
    def dtype(self):
        return self.x.dtype

    def dense(self) -> jax.Array:
        """The cotangent as an array."""
        return lax.reshape(jnp.sum(self.x, self.axes), self.shape)

    def over_steps(self, x) -> Sums:
        """The sum of this over the first axis, which x has besides."""
        return Sums(x, (0, *_shifted(self.axes)), self.shape)


@jax.tree_util.register_pytree_node_class
class Rows(Factored):
    """Zeros but for ``values`` added at ``indices``: what looking up a few rows of a table leaves.

    Attributes:
      indices, values: as `jax.lax.scatter_add` takes them.
      shape: of the cotangent.
      numbers: `jax.lax.ScatterDimensionNumbers`.
      options: of `jax.lax.scatter_add`.

    Example:
      >>> import fbprop, jax.numpy as jnp
      >>> _, pullback = fbprop.vjp(lambda t: t[jnp.array([1, 1])], jnp.ones((3, 2)), factored=True)
      >>> (rows,) = pullback(jnp.ones((2, 2)))
      >>> rows.values.shape, rows.dense().tolist()
      ((2, 2), [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    """

    def __init__(self, indices, values, shape, numbers, options: dict[str, Any]):
        self.indices, self.values, self.shape = indices, values, tuple(shape)
        self.numbers, self.options = numbers, options

    def tree_flatten(self):
        static = self.shape, self.numbers, tuple(self.options.items())
        return (self.indices, self.values), static

    @classmethod
    def tree_unflatten(cls, static, arrays):
        *static, options = static
        return cls(*arrays, *static, dict(options))

    @property
    def dtype(self):
        return self.values.dtype

    def dense(self) -> jax.Array:
        """The cotangent as an array."""
        zeros = jnp.zeros(self.shape, self.values.dtype)
        if self._is_one_each():
            return self.add_to(zeros)
        return self._added(zeros, self.indices, self.values)

    def add_to(self, total):
        """``total`` with these added, in its place; what devices have of it adds up afterwards."""
        if self._is_one_each():
            if not isinstance(self.values, jax.core.Tracer):
                return self._added(total, self.indices, self.values)
            return at_lowering(
                total, self.indices, self.values,
                cpu=lambda *xs: [self._added(*xs)], default=lambda *xs: [self._chosen(*xs)],
            )[0]
        return by_platform(
            total, self.indices, self.values,
            cpu=self._added, cuda=self._added, tpu=self._on_tpu(), default=self._apart,
        )

    def joined(self, other: Rows) -> jax.Array:
        """The sum of both, but on CPUs of two arrays, of which XLA makes one of all the rows.

        ``word_embedding_step`` moves 1.00 of JAX's bytes on an H100 so, 1.11 one after the other.
        On a TPU a table that is larger than what it has at hand then takes 1.01 of the memory for
        0.41 (262144 words), a smaller one 1.00 for 1.16 (32000).
        """
        return by_platform(
            other.dense(), self.indices, self.values,
            cpu=self._added, tpu=self._on_tpu(), default=self._apart,
        )

    def _on_tpu(self):
        """The form for a TPU: a table that lies at hand is added to once it is whole."""
        large = math.prod(self.shape) * self.dtype.itemsize > AT_HAND
        return self._added if large else self._apart

    def _is_one_each(self):
        return is_one_each(self.shape, jax.typeof(self.indices), self.numbers)

    def _added(self, total, indices, values):
        return scatter_add(total, indices, values, self.numbers, self.options)

    def _apart(self, total, indices, values):
        return total + self._added(lax.full_like(total, 0), indices, values)

    def _chosen(self, total, indices, values):
        return total + one_each(self.shape, indices, values, self.numbers, self.options["mode"])

    def map(self, fun: Callable[[jax.Array], jax.Array]) -> Rows:
        """The same rows of other values: ``fun`` of these, elementwise."""
        return Rows(self.indices, fun(self.values), self.shape, self.numbers, self.options)

    def merged(self) -> Rows | jax.Array:
        """The same, no two rows at one place, so that squares are those of the sums.

        As an array where that is no larger: of more rows than the table has, or single elements.
        """
        windows = math.prod(self.indices.shape[:-1])
        rows = math.prod(self.shape[d] for d in self.numbers.inserted_window_dims)
        table = jax.ShapeDtypeStruct(self.shape, self.dtype)
        whole = are_whole_rows(table, self.values.shape, self.numbers, self.options)
        if not whole or windows >= rows or windows == self.values.size:
            return self.dense()
        mode = self.options["mode"]
        indices, sums, numbers = merged(self.shape, self.indices, self.values, self.numbers, mode)
        options = self.options | {
            "indices_are_sorted": False, "unique_indices": True,
            "mode": lax.GatherScatterMode.FILL_OR_DROP,
        }
        return Rows(indices, sums, self.shape, numbers, options)

    def sum(self, axis: int) -> jax.Array:
        """The dense cotangent summed over an axis, without it if the rows are single elements."""
        n = self.numbers
        if n.update_window_dims or axis not in n.scatter_dims_to_operand_dims:
            return jnp.sum(self.dense(), axis)
        column = n.scatter_dims_to_operand_dims.index(axis)
        at, values = self.indices[..., column], self.values
        if self.options["mode"] != lax.GatherScatterMode.CLIP:  # elements outside are dropped
            inside = (at >= 0) & (at < self.shape[axis])
            values = jnp.where(inside, values, jnp.zeros((), values.dtype))
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])

        def left(dims):
            return tuple(d - (d > axis) for d in dims if d != axis)

        numbers = lax.ScatterDimensionNumbers(
            (), left(n.inserted_window_dims), left(n.scatter_dims_to_operand_dims),
            left(n.operand_batching_dims), n.scatter_indices_batching_dims,
        )
        indices = jnp.delete(self.indices, column, axis=-1)
        added = lambda at, values: [
            Rows(at, values, shape, numbers, self.options | _UNORDERED).dense()
        ]
        if not self._is_one_each() or not isinstance(values, jax.core.Tracer):
            return added(indices, values)[0]
        # On a CPU a sum that is a view of the values has the exponentials of a loss by labels kept.
        form = lambda _, values: [lax.reshape(values, shape)]
        return at_lowering(indices, values, cpu=added, default=form)[0]

    def over_steps(self, indices, values) -> Rows:
        """The sum over the first axis, which both arrays have besides."""
        numbers = self.numbers
        numbers = lax.ScatterDimensionNumbers(
            tuple(_shifted(numbers.update_window_dims)), numbers.inserted_window_dims,
            numbers.scatter_dims_to_operand_dims, numbers.operand_batching_dims,
            tuple(_shifted(numbers.scatter_indices_batching_dims)),
        )
        # What is in order, or unique, within a step need not be so across steps.
        return Rows(indices, values, self.shape, numbers, self.options | _UNORDERED)


def exchanged(precision):
    """The ``precision`` of a product (`jax.lax.dot_general`) for its factors in the other order."""
    if isinstance(precision, lax.DotAlgorithm):
        return precision._replace(
            lhs_precision_type=precision.rhs_precision_type,
            rhs_precision_type=precision.lhs_precision_type,
            lhs_component_count=precision.rhs_component_count,
            rhs_component_count=precision.lhs_component_count,
        )
    return precision[::-1] if isinstance(precision, tuple) else precision


@functools.lru_cache
def _product_dtype(x, y):
    """Of a product of such factors: where they differ, JAX does not go by `jnp.promote_types`."""
    if x == y:
        return x
    one = [jax.ShapeDtypeStruct((), dtype) for dtype in (x, y)]
    return jax.eval_shape(lambda x, y: lax.dot_general(x, y, (((), ()), ((), ()))), *one).dtype


def _turned(contraction):
    """Its wide form, and a transpose that XLA does not find and fold."""
    return contraction._wide()._in_order(lambda out: held(out, after=out))


def _frozen(pair):
    return tuple(tuple(int(d) for d in dims) for dims in pair)


def _shifted(dims):
    return [d + 1 for d in dims]


def _consecutive(dims):
    return len(dims) > 1 and list(dims) == list(range(dims[0], dims[0] + len(dims)))


def _merged(x, over, batch):
    """``x`` with its summed dimensions as one, and where these and the batch are then."""
    first, n = over[0], len(over)
    shape = (*x.shape[:first], math.prod(x.shape[d] for d in over), *x.shape[first + n :])
    return lax.reshape(x, shape), [first], [d if d < first else d - n + 1 for d in batch]
