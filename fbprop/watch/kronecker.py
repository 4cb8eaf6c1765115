"""Kronecker factors of a parameter's curvature, and what stands for them where there are none.

A weight that gets g = Σₜ xₜyₜᵀ from an example has curvature E ggᵀ ≈ A ⊗ G, A of the x and G of
the y (Martens and Grosse, arXiv 1503.05671; convolutions: 1602.01407; places shared by a weight,
expanded or reduced: 2311.00636). It does not matter here which of the two is the layer's input.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.watch.factors import Form, Kernel, Looked, Outer, total_squares, wide

MODES = ("expand", "reduce")
BLOCK = 1024  # elements of a vector that has a block of its own; one of more has a diagonal


class Kronecker(Form):
    """A ⊗ G of a parameter whose dimensions ``parts`` are rows and columns of a matrix.

    Attributes:
      a: [D, D], or [D] if it is a diagonal; g: [K, K].
      parts: dimensions of the parameter that are D, that are K; shape: the parameter's.
    """

    arrays = ("a", "g")
    static = ("parts", "shape", "terms")

    def dense(self):
        """A ⊗ G [n, n], in the order of the parameter's elements."""
        a = jnp.diag(self.a) if self.a.ndim == 1 else self.a
        order = jnp.arange(math.prod(self.shape)).reshape(self.shape)
        at = jnp.argsort(self._matrix(order).reshape(-1))
        return jnp.kron(a, self.g)[at[:, None], at]

    def inverse(self, damping):
        """(A ⊗ G + damping)⁻¹, nearly: of (A + πδ) ⊗ (G + δ/π), δ = √damping, π² their traces'."""
        n = self.a.shape[0]
        trace = (jnp.sum(self.a) if self.a.ndim == 1 else jnp.trace(self.a)) / n
        other = jnp.trace(self.g) / len(self.g)
        tiny = jnp.finfo(self.g.dtype).tiny
        ratio = jnp.sqrt(jnp.maximum(trace, tiny) / jnp.maximum(other, tiny))
        delta = jnp.sqrt(jnp.asarray(damping, self.g.dtype))
        a = 1 / (self.a + ratio * delta) if self.a.ndim == 1 else _inverse(self.a, ratio * delta)
        return Kronecker(a, _inverse(self.g, delta / ratio), self.parts, self.shape, self.terms)

    def times(self, gradient):
        """A X G for a gradient of the parameter, as such a one."""
        x = self._matrix(gradient)
        x = self.a[:, None] * x if self.a.ndim == 1 else self.a @ x
        order = [*self.parts[0], *self.parts[1]]
        x = (x @ self.g).reshape([self.shape[d] for d in order])
        return lax.transpose(x, np.argsort(order))

    def _matrix(self, x):
        order = [*self.parts[0], *self.parts[1]]
        return lax.transpose(x, order).reshape(math.prod(self.shape[d] for d in self.parts[0]), -1)


class Block(Form):
    """The whole matrix [n, n] of a small parameter."""

    arrays = ("matrix",)
    static = ("shape",)

    def dense(self):
        return self.matrix

    def inverse(self, damping):
        return Block(_inverse(self.matrix, damping), self.shape)

    def times(self, gradient):
        return (self.matrix @ gradient.reshape(-1)).reshape(self.shape)


class Diagonal(Form):
    """The diagonal, like the parameter."""

    arrays = ("elements",)

    def dense(self):
        return jnp.diag(self.elements.reshape(-1))

    def inverse(self, damping):
        return Diagonal(1 / (self.elements + damping))

    def times(self, gradient):
        return self.elements * gradient


def _inverse(matrix, damping):
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.scipy.linalg.cho_solve(
        jax.scipy.linalg.cho_factor(matrix + jnp.asarray(damping, matrix.dtype) * eye), eye
    )


def kronecker_sums(form, mode, parameter=None):
    """Sums over a batch's examples of a form; of nothing for a parameter without one."""
    if form is None:
        return Diagonal(jnp.zeros_like(parameter))
    if isinstance(form, Outer) and not form.parts[0]:
        return _of_factors(form.x[:, 0], form.y[:, 0], form.parts[1:], form.shape, mode)
    if isinstance(form, Kernel) and form.problem.geometry.groups == 1:
        return _of_factors(*_patches(form), _kernel_parts(form), form.shape, mode)
    if isinstance(form, Looked) and len(form.shape) == 2:
        return _of_rows(form)
    shape = jax.eval_shape(jax.vmap(lambda form: form.dense()), form).shape[1:]
    if math.prod(shape) <= BLOCK and len(shape) <= 1:
        g = wide(jax.vmap(lambda form: form.dense().reshape(-1))(form))
        return Block(g.T @ g, shape)
    return Diagonal(total_squares(form))


def _of_factors(x, y, parts, shape, mode):
    """x [B, T, D], y [B, T, K]."""
    terms = x.shape[1]
    x, y = wide(x), wide(y)
    if mode == "reduce":
        x, y, terms = jnp.sum(x, 1, keepdims=True), jnp.sum(y, 1, keepdims=True), terms**2
    # As rows of one matrix, XLA finds that a bias's block is its weight's g.
    a, g = (f.T @ f for f in (f.reshape(-1, f.shape[-1]) for f in (x, y)))
    return Kronecker(a, g, parts, shape, terms)


def _of_rows(form):
    """A table's: of one-hot codes, whose products are a diagonal of counts."""
    batch, terms = form.indices.reshape(len(form.indices), -1).shape
    values = wide(form.values.reshape(batch * terms, -1))
    counts = jnp.zeros(form.shape[0], values.dtype).at[form.indices.reshape(-1)].add(1)
    return Kronecker(counts, values.T @ values, ((0,), (1,)), form.shape, terms)


def _patches(form):
    """x [B, T, C·K], what every place of the result sees, and ȳ [B, T, O]."""
    problem = form.problem
    x = jnp.squeeze(lax.transpose(form.x, (0, *(i + 1 for i in problem.to_x))), 1)
    y = jnp.squeeze(lax.transpose(form.dy, (0, *(i + 1 for i in problem.to_y))), 1)
    n, g = x.ndim - 2, problem.geometry
    image = (0, n + 1, *range(1, n + 1))
    x = lax.conv_general_dilated_patches(
        x, problem.w[:-2], g.strides, g.pads, g.dilation, g.kernel_dilation,
        lax.ConvDimensionNumbers(image, (n + 1, n, *range(n)), image),
    )
    return (a.reshape(len(a), -1, a.shape[-1]) for a in (x, y))


def _kernel_parts(form):
    """Dimensions of a kernel: input channels and space, in the order of patches; outputs."""
    *space, c, o = form.problem.to_w
    return (c, *space), (o,)


def scaled(sums, examples, sweeps, runs):
    """Means over the examples of the sums of this many runs, of which so many share a mean.

    A product's two factors are both summed over runs, of which one is the same in each.
    """
    def one(s):
        if isinstance(s, Kronecker):
            a, g = s.a / (examples * s.terms * runs), s.g / (examples * sweeps)
            return Kronecker(a, g, s.parts, s.shape, s.terms)
        if isinstance(s, Block):
            return Block(s.matrix / (examples * sweeps), s.shape)
        return Diagonal(s.elements / (examples * sweeps))

    return jax.tree.map(one, sums, is_leaf=lambda s: isinstance(s, Form))
