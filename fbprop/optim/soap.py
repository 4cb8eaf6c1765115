"""SOAP: Adam in the basis in which Shampoo would precondition."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_map

from fbprop.optim.adam import bias_correction, scale_by_adam
from fbprop.optim.arguments import check_count, check_decay, check_least
from fbprop.optim.chain import chain
from fbprop.optim.decay import decay_parts
from fbprop.optim.paths import grouped
from fbprop.optim.transform import (
    Optimizer,
    abs_squared,
    leafwise,
    real_zeros,
    scale_by_learning_rate,
    zeros,
)


def soap(learning_rate, b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, *,
         decay: float = 0.95, every: int = 10, largest: int = 2048, weight_decay: float = 0.0,
         mask=None, matrices=None) -> Optimizer:
    """SOAP (Vyas et al. 2024, arXiv:2409.11321) for matrices, Adam else.

    For a weight of shape [in, out]::

        m ← b1 m + (1 − b1) g,    v ← b2 v + (1 − b2) (Qᵀ g P)²
        p ← p − α (Q (Qᵀ m̂ P / (√v̂ + eps)) Pᵀ + λ p)
        L ← β L + (1 − β) g gᵀ,   R ← β R + (1 − β) gᵀ g
        every so many steps Q ← qr(L Q), P ← qr(R P)

    Q and P start as the eigenvectors of g gᵀ and gᵀ g of the first gradient, which moves no matrix:
    in its own basis it is diagonal, and rounding errors would be divided by their own size.

    Args:
      learning_rate: α, a number or a schedule.
      b1, b2, eps: of Adam; other parameters have them too.
      decay: β.
      every: steps between two turns of the basis, which cost (in³ + out³) 4/3 flops and more.
      largest: a side longer than that is not turned: an embedding's words, say.
      weight_decay: λ, decoupled. mask: which matrices decay, see `select`; None: all.
      matrices: which parameters take SOAP's step, see `select`; None: those with two axes. One of
        more axes, a convolution's, is taken as a matrix of its last axis and the others.

    Raises:
      ValueError: a value outside its range, or a chosen leaf with fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> optimizer = optim.soap(0.1)
      >>> params = {"w": jnp.array([[3.0, 4.0], [-4.0, 3.0]]), "b": jnp.ones(2)}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool(jnp.allclose(updates["b"], -0.1))
      True
    """
    of_matrices = chain(
        scale_by_soap(b1, b2, eps, decay=decay, every=every, largest=largest),
        *decay_parts(weight_decay, mask), scale_by_learning_rate(learning_rate),
    )
    others = chain(scale_by_adam(b1, b2, eps), scale_by_learning_rate(learning_rate))
    chosen = _two_axes if matrices is None else matrices
    return grouped([(chosen, of_matrices), (lambda p: tree_map(lambda _: True, p), others)])


def _two_axes(params):
    return tree_map(lambda p: p.ndim == 2, params)


def scale_by_soap(b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, *, decay: float = 0.95,
                  every: int = 10, largest: int = 2048) -> Optimizer:
    """SOAP's direction for every leaf: see `soap`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import optim
      >>> part = optim.scale_by_soap()
      >>> part.update(jnp.zeros((2, 3)), part.init(jnp.zeros((2, 3))))[0].tolist()
      [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_decay("decay", decay)
    check_least(eps=eps)
    check_count("every", every)
    check_count("largest", largest, 0)

    def per_step(count):
        done = jnp.maximum(count - 1, 1)
        turn = jnp.where(count == 1, 1, jnp.where((count - 1) % every == 0, 2, 0))
        return turn, bias_correction(b1, done), bias_correction(b2, done)

    def rule(g, slots, scalars, p):
        turn, c1, c2 = scalars
        if g.ndim < 2:
            raise ValueError(
                f"SOAP's step is for matrices, got a parameter of shape {g.shape} expected at "
                "least two axes: leave it to Adam by the argument matrices."
            )
        if g.size == 0:
            return g, slots
        shape, g, turn = g.shape, _matrix(g), turn.astype(jnp.int32)
        rows, columns = (_Side(slots[n], slots[f"{n}_basis"]) for n in ("rows", "columns"))
        turned = lambda x: columns.into(rows.into(x).T).T
        now = jnp.where(turn == 1, jnp.zeros_like(g), g)
        m = b1 * _matrix(slots["mu"]) + (1 - b1) * now
        v = b2 * _matrix(slots["nu"]) + (1 - b2) * abs_squared(turned(now))
        step = turned(m) / c1 / (jnp.sqrt(v / c2) + eps)
        step = columns.out_of(rows.out_of(step).T).T
        rows, columns = rows.seen(g, decay).turned(turn), columns.seen(g.T, decay).turned(turn)
        return step.reshape(shape), {
            "mu": m.reshape(shape), "nu": v.reshape(shape), "rows": rows.average,
            "rows_basis": rows.basis, "columns": columns.average, "columns_basis": columns.basis,
        }

    square = lambda axis: lambda p: _square(p, axis, largest)
    return leafwise(rule, {
        "mu": zeros, "nu": real_zeros, "rows": square(0), "rows_basis": square(0),
        "columns": square(1), "columns_basis": square(1),
    }, per_step=per_step)


class _Side:
    """The running average of g gᴴ, and its eigenvectors; of a side too long [0, 0] both."""

    def __init__(self, average, basis):
        self.average, self.basis = average, basis

    def seen(self, g, decay):
        if not self.average.size:
            return self
        return _Side(decay * self.average + (1 - decay) * g @ g.conj().T, self.basis)

    def turned(self, turn):
        """By 0: not; 1: to the eigenvectors; 2: towards them. The longest stand in front, where
        orthogonal iteration leaves them."""
        if not self.average.size:
            return self
        basis = lax.switch(turn, [
            lambda average, basis: basis,
            lambda average, basis: jnp.linalg.eigh(average)[1][:, ::-1],
            lambda average, basis: jnp.linalg.qr(average @ basis)[0],
        ], self.average, self.basis)
        return _Side(self.average, basis)

    def into(self, x):
        return self.basis.conj().T @ x if self.basis.size else x

    def out_of(self, x):
        return self.basis @ x if self.basis.size else x


def _matrix(x):
    return x.reshape(-1, x.shape[-1])


def _square(p, axis, largest):
    start = zeros(p)
    n = _matrix(start).shape[axis] if start.size and start.ndim > 1 else 0
    n = n if n <= largest else 0
    return jnp.zeros((n, n), start.dtype)
