"""One example's cotangent of a parameter, as the backward sweep leaves it, and its arithmetic.

A form is a pytree of one example's arrays; under `jax.vmap`, and outside of it with one more
dimension in front, of a batch's. Letters: H batch dimensions of a product, T terms that it sums
over, D and K what is left of its factors.

| form | of | squared norm |
|---|---|---|
| `Outer` | a product's weight, g = Σₜ xₜ yₜᵀ | Σₛₜ (xₛ·xₜ)(yₛ·yₜ), or ‖g‖², one example at a time |
| `Looked` | a table, g = vₙ at rows iₙ | Σₘₙ [iₘ = iₙ] vₘ·vₙ, or likewise |
| `Kernel` | a convolution, g = x ∗ ȳ | ‖g‖², one example at a time |
| `Own` | everything else | ‖g‖² |

Of all of them a weighted sum over examples is one product, one convolution, one addition of rows.
The first norm is Goodfellow's (arXiv 1510.01799) for T = 1, Li's (arXiv 2110.05679) otherwise.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.core.devices import by_devices
from fbprop.core.factored import Contraction, Factored, Rows, is_factored


def wide(x):
    """Sums of 16-bit numbers are made in float32."""
    return x.astype(jnp.float32) if x.dtype.itemsize <= 2 else x


ORDERS = ("transpose", "convert_element_type", "copy")


class Form:
    """Base of the forms: arrays, by name in ``arrays``, and what is static, in ``static``."""

    arrays: ClassVar[tuple[str, ...]] = ()
    static: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *values):
        for name, value in zip((*self.arrays, *self.static), values, strict=True):
            setattr(self, name, value)

    def __init_subclass__(cls):
        jax.tree_util.register_pytree_node(
            cls,
            lambda form: ([getattr(form, n) for n in cls.arrays],
                          tuple(getattr(form, n) for n in cls.static)),
            lambda static, arrays: cls(*arrays, *static),
        )

    def squared(self):
        """Its squared norm: here of the array, one example's at a time."""
        return jnp.sum(jnp.square(wide(self.dense())))

    def formulation(self) -> str:
        """How `squared` is computed, in words."""
        return "the array of one example at a time"

    at_once = False  # whether all examples' `squared` are computed at once


class Own(Form):
    """The array itself."""

    arrays = ("array",)
    at_once = True

    def dense(self):
        return self.array

    def total(self, scale):
        return jnp.tensordot(scale.astype(self.array.dtype), self.array, 1)

    def formulation(self):
        return "its own gradient"


class Outer(Form):
    """Products: x [H, T, D], y [H, T, K] summed over T, to ``sizes`` in ``order``.

    Attributes:
      parts: dimensions of the parameter that come from H, from D, from K.
      shape: of the parameter.
    """

    arrays = ("x", "y")
    static = ("parts", "shape", "precision")

    @property
    def terms(self):
        return self.x.shape[-2]

    def _summed(self, x, y, over):
        out = jnp.einsum(f"{over}htd,{over}htk->hdk", x, y, precision=self.precision)
        order = [d for part in self.parts for d in part]
        out = out.reshape([self.shape[d] for d in order])
        return lax.transpose(out, np.argsort(order))

    def dense(self):
        return self._summed(self.x, self.y, "")

    def total(self, scale):
        return self._summed(self.x, self.y * _along(scale, self.y), "b")

    def total_squares(self):
        """Σ g² over the batch, for products of one term."""
        return self._summed(jnp.square(self.x), jnp.square(self.y), "b")

    @property
    def at_once(self):
        t, d, k = self.terms, self.x.shape[-1], self.y.shape[-1]
        return t == 1 or t * (d + k) < d * k

    def squared(self):
        if not self.at_once:
            return super().squared()
        x, y = wide(self.x), wide(self.y)
        if self.terms == 1:
            return jnp.sum(jnp.sum(x * x, (1, 2)) * jnp.sum(y * y, (1, 2)))
        return jnp.sum(jnp.einsum("hsd,htd->hst", x, x) * jnp.einsum("hsk,htk->hst", y, y))

    def formulation(self):
        if self.terms == 1:
            return "norms of two factors"
        return "inner products of factors" if self.at_once else super().formulation()

    def joined(self, other):
        """This and another one of the same parameter, or None if they part it differently."""
        if self.parts[0] or other.parts[0]:
            return None
        x, y = other.x, other.y
        if self.parts == (other.parts[0], other.parts[2], other.parts[1]):
            x, y = y, x
        elif self.parts != other.parts:
            return None
        return Outer(
            jnp.concatenate([self.x, x], 1), jnp.concatenate([self.y, y], 1), self.parts,
            self.shape, self.precision,
        )


class Looked(Form):
    """Rows of a table: ``indices`` [n] and ``values`` [n, ...]; outside of it they are 0."""

    arrays = ("indices", "values")
    static = ("shape",)

    def flat(self):
        return self.indices.reshape(-1), self.values.reshape(-1, *self.shape[1:])

    def _added(self, indices, values):
        zeros = jnp.zeros(self.shape, values.dtype)
        return zeros.at[indices].add(values, mode="promise_in_bounds")

    def dense(self):
        return self._added(*self.flat())

    def total(self, scale):
        values = self.values * _along(scale, self.values)
        return self._added(self.indices.reshape(-1), values.reshape(-1, *self.shape[1:]))

    @property
    def at_once(self):
        return self.indices.shape[-1] < max(self.shape[0], 2)

    def squared(self):
        if not self.at_once:
            return super().squared()
        indices, values = self.flat()
        values = wide(values.reshape(len(indices), -1))
        same = indices[:, None] == indices[None]
        return jnp.sum(jnp.where(same, jnp.einsum("md,nd->mn", values, values), 0))

    def formulation(self):
        return "inner products of rows" if self.at_once else super().formulation()

    def cross(self, outer):
        """The inner product with an `Outer` of the same table, rows by D or by K."""
        x, y = (outer.x, outer.y) if outer.parts[1] == (0,) else (outer.y, outer.x)
        indices, values = self.flat()
        values = values.reshape(len(indices), -1)
        met = jnp.take(wide(x[0]), indices, axis=1)  # [T, n]
        return jnp.sum(met * jnp.einsum("tk,nk->tn", wide(y[0]), wide(values)))


class Kernel(Form, Factored):
    """A convolution's kernel: its input and its result's cotangent; ``problem`` of one image."""

    arrays = ("x", "dy")
    static = ("problem", "shape", "dtype")

    def dense(self):
        return self.problem.cotangent(1, self.dy, self.x)

    def total(self, scale):
        def merged(a, order):
            n = order[0] + 1
            a = jnp.moveaxis(a, 0, n - 1)
            return a.reshape(*a.shape[: n - 1], -1, *a.shape[n + 1 :])

        dy = merged(self.dy * _along(scale, self.dy), self.problem.to_y)
        return self.problem.cotangent(1, dy, merged(self.x, self.problem.to_x))


class Tied(Form):
    """A table that is looked up and multiplied with: `Looked` and `Outer` of one parameter."""

    arrays = ("looked", "outer")

    def dense(self):
        return self.looked.dense() + self.outer.dense()

    def total(self, scale):
        return self.looked.total(scale) + self.outer.total(scale)

    at_once = False

    def squared(self):
        return self.looked.squared() + self.outer.squared() + 2 * self.looked.cross(self.outer)

    def formulation(self):
        return f"{self.looked.formulation()}; {self.outer.formulation()}"


def _along(scale, x):
    return scale.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def each(fun, forms, at_once: bool):
    """``fun`` of every example's form: at once, or one after the other, if on one device."""
    if at_once:
        return jax.vmap(fun)(forms)
    return by_devices(
        forms, one=lambda forms: lax.map(fun, forms), several=lambda forms: jax.vmap(fun)(forms)
    )


class Viewed(Form):
    """A form of the parameter in another shape."""

    arrays = ("form",)
    static = ("use",)

    def dense(self):
        return self.use.back(self.form.dense())

    def total(self, scale):
        return self.use.back(self.form.total(scale))

    @property
    def at_once(self):
        return self.form.at_once

    def squared(self):
        return self.form.squared()

    def formulation(self):
        return self.form.formulation()


def total_squares(form):
    """Σ over examples of g², elementwise."""
    if isinstance(form, Outer) and form.x.shape[-2] == 1:
        return form.total_squares()
    if isinstance(form, Own):
        return jnp.sum(jnp.square(form.array), 0)

    def one(form):
        return jnp.square(form.dense())

    def add(total, form):
        return total + one(form), None

    def one_by_one(form):
        first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], form))
        return lax.scan(add, jnp.zeros(first.shape, first.dtype), form)[0]

    return by_devices(
        form, one=one_by_one, several=lambda form: jnp.sum(jax.vmap(one)(form), 0)
    )


def gram(form):
    """Inner products of every two examples' [B, B]."""
    if isinstance(form, Outer) and form.x.shape[1:3] == (1, 1):
        x, y = wide(form.x[:, 0, 0]), wide(form.y[:, 0, 0])
        return (x @ x.T) * (y @ y.T)
    g = wide(jax.vmap(lambda form: form.dense().reshape(-1))(form))
    return g @ g.T


def form_of(cotangent, use):
    """One example's cotangent of a use, as the form of its parameter's."""
    orders = [eqn.params["permutation"] for eqn in use.views if eqn.primitive.name == "transpose"]
    only_orders = all(eqn.primitive.name in ORDERS for eqn in use.views)
    if isinstance(cotangent, Contraction):
        for order in reversed(orders) if only_orders else ():
            cotangent = cotangent.transposed(np.argsort(order).tolist())
        form = _outer(cotangent)
    elif isinstance(cotangent, Rows) and _whole_rows(cotangent):
        form = _looked(cotangent)
    elif isinstance(cotangent, Form):
        form = cotangent
    else:
        return Own(use.back(cotangent.dense() if is_factored(cotangent) else cotangent))
    kept_shape = only_orders and (isinstance(form, Outer) or not orders)
    return form if kept_shape else Viewed(form, use)


def combined(forms):
    """The sum of several forms of one parameter, as a form."""
    first, *rest = forms
    for form in rest:
        first = _sum(first, form) or Own(first.dense() + form.dense())
    return first


def _sum(a, b):
    if isinstance(a, Outer) and isinstance(b, Outer):
        return a.joined(b)
    if isinstance(a, Looked) and isinstance(b, Looked):
        indices, values = zip(a.flat(), b.flat())
        return Looked(jnp.concatenate(indices), jnp.concatenate(values), a.shape)
    for looked, outer in ((a, b), (b, a)):
        if isinstance(looked, Looked) and isinstance(outer, Outer):
            by_rows = outer.parts[0] == () and (0,) in outer.parts
            return Tied(looked, outer) if by_rows else None
    return None


def _outer(c):
    arrays, n = [], len(c.batch[0])
    for i, f in enumerate((c.x, c.y)):
        used = *c.batch[i], *c.over[i]
        f = lax.transpose(f, (*used, *(d for d in range(f.ndim) if d not in used)))
        sizes = f.shape[:n], f.shape[n : len(used)], f.shape[len(used) :]
        arrays.append(f.reshape([math.prod(s) for s in sizes]))
    d = n + c.x.ndim - len(c.batch[0]) - len(c.over[0])
    parts = tuple(c.order[:n]), tuple(c.order[n:d]), tuple(c.order[d:])
    return Outer(*arrays, parts, tuple(c.shape), c.options.get("precision"))


def _whole_rows(rows):
    n, width = rows.numbers, len(rows.shape) - 1
    return (
        n.inserted_window_dims == n.scatter_dims_to_operand_dims == (0,)
        and len(n.update_window_dims) == width and not n.operand_batching_dims
        and n.update_window_dims == tuple(range(rows.values.ndim - width, rows.values.ndim))
        and rows.values.shape[rows.values.ndim - width :] == rows.shape[1:]
    )


def _looked(rows):
    """As a looked-up row is read: from the nearest there is, or not at all."""
    at, last = rows.indices[..., 0], rows.shape[0] - 1
    values = rows.values
    if rows.options["mode"] != lax.GatherScatterMode.CLIP:
        inside = ((at >= 0) & (at <= last)).reshape(*at.shape, *(1,) * (len(rows.shape) - 1))
        values = jnp.where(inside, values, jnp.zeros((), values.dtype))
    return Looked(jnp.clip(at, 0, last), values, rows.shape)
