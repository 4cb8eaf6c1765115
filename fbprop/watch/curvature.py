"""Curvature from the same sweep: Fisher and Gauss-Newton diagonals, blocks, Kronecker factors.

Two matrices, over the parameters of one array each ("block"):

* the empirical Fisher matrix, E gᵢgᵢᵀ over the gradients of examples: of ``loss(params, *batch)``;
* the generalised Gauss-Newton matrix, E JᵢᵀHᵢJᵢ, J the network's Jacobian and H the Hessian of an
  example's loss in the network's output (Schraudolph 2002; for cross-entropy and squared error it
  is the Fisher matrix): of ``network(params, inputs)`` and ``loss(outputs, *targets)``, a mean over
  the batch. With H = SSᵀ, the gradients of ⟨S z, outputs⟩ for a fixed vector S z take the place of
  those of the loss: one sweep per column of S, exactly, or sweeps with random signs z, on average.

No layer is tagged: whatever leaves a product's factors has Kronecker factors. Products with the
whole matrices, and what can be learned from products alone, are in `fbprop.watch.products`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_leaves, tree_map

from fbprop.watch.example_sweep import sweep
from fbprop.watch.factors import total_squares, wide
from fbprop.watch.kronecker import MODES, Block, Diagonal, Kronecker, kronecker_sums, scaled
from fbprop.watch.products import ggn_vector, hessian_vector, hutchinson, top_eigenvalue

__all__ = [
    "Block", "Diagonal", "Kronecker", "fisher", "ggn", "ggn_vector", "hessian_vector", "hutchinson",
    "softmax_root", "squared_root", "top_eigenvalue",
]
KINDS = ("diagonal", "blocks", "kronecker")


def fisher(loss: Callable, kind: str = "diagonal", *, mode: str = "expand", rules=None) -> Callable:
    """The empirical Fisher matrix E gᵢgᵢᵀ: of each parameter its diagonal, block or factors.

    Args:
      loss: ``(params, *batch) -> scalar``, a mean over the batch's examples.
      kind: ``"diagonal"``: like the parameter; ``"blocks"``: [n, n] of a parameter of n elements;
        ``"kronecker"``: `fbprop.watch.kronecker.Kronecker` where there are factors, else a `Block`
        of a vector or a `Diagonal`.
      mode: of Kronecker factors of weights that are used at T places of an example (Eschenhagen et
        al., arXiv 2311.00636): ``"expand"``: places are like examples; ``"reduce"``: factors are
        summed over places first.
      rules: the table of rules.

    Returns:
      A function ``(params, *batch) -> pytree like the parameters``.

    Raises:
      ValueError: another kind or mode; as `fbprop.watch.per_example.norms`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop.watch import curvature
      >>> def loss(w, x):
      ...     return jnp.mean(x @ w)
      >>> curvature.fisher(loss)(jnp.ones(2), jnp.array([[3.0, 4.0], [1.0, 0.0]])).tolist()
      [5.0, 8.0]
    """
    _check(kind, mode)

    def fisher_of(params, *batch):
        consume, finish = _of_kind(kind, mode)
        _, summed = sweep(lambda swept: ((), consume(swept)), loss, params, batch, rules=rules)
        return finish(summed, _examples(batch), 1)

    return fisher_of


def ggn(
    network: Callable, loss: Callable, kind: str = "diagonal", *, mode: str = "expand",
    samples: int | None = None, root: Callable | None = None, rules=None,
) -> Callable:
    """The generalised Gauss-Newton matrix: of each parameter its diagonal, block or factors.

    Args:
      network: ``(params, inputs) -> outputs``, an array whose first dimension is the batch.
      loss: ``(outputs, *targets) -> scalar``, a mean over the batch, convex in the outputs.
      kind, mode, rules: see `fisher`.
      samples: sweeps with random signs, of diagonals and blocks unbiased; None: exact, one sweep
        per output of an example.
      root: ``(output, *target, z) -> S z`` for one example, S with SSᵀ = H: `softmax_root`,
        `squared_root`; default: by an eigendecomposition of H.

    Returns:
      A function ``(params, inputs, *targets, key=None)``; with samples it needs a key.

    Raises:
      ValueError: another kind or mode, or samples without a key; as `per_example.norms`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop.watch import curvature
      >>> def loss(outputs, y):
      ...     return jnp.mean((outputs - y) ** 2) / 2
      >>> diagonal = curvature.ggn(lambda w, x: x @ w, loss)
      >>> diagonal(jnp.ones(2), jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.ones(2)).tolist()
      [5.0, 8.0]
    """
    _check(kind, mode)
    columns = root or _root_of(loss)

    def one_sweep(consume, params, inputs, targets, signs):
        def linear(params, inputs, targets, signs):
            outputs = network(params, inputs)
            direction = jax.vmap(columns)(lax.stop_gradient(outputs), *targets, signs)
            return jnp.sum(lax.stop_gradient(direction) * outputs) / len(outputs)

        batch = inputs, targets, signs
        return sweep(lambda swept: ((), consume(swept)), linear, params, batch, rules=rules)[1]

    def ggn_of(params, inputs, *targets, key=None):
        consume, finish = _of_kind(kind, mode)
        outputs = jax.eval_shape(network, params, inputs)
        n = outputs.size // max(len(outputs), 1)
        if samples is None:
            signs = jnp.eye(n, dtype=outputs.dtype)
            signs = jnp.broadcast_to(signs[:, None], (n, len(outputs), n))
        elif key is None:
            raise ValueError(f"Signs are drawn with a key, got samples={samples} and no key.")
        else:
            signs = jax.random.rademacher(key, (samples, len(outputs), n), outputs.dtype)

        def add(total, signs):
            found = one_sweep(consume, params, inputs, targets, signs)
            return tree_map(jnp.add, total, found), None

        if len(signs) == 1:
            return finish(one_sweep(consume, params, inputs, targets, signs[0]), len(outputs), 1)
        types = jax.eval_shape(
            lambda signs: one_sweep(consume, params, inputs, targets, signs), signs[0]
        )
        zeros = tree_map(lambda t: jnp.zeros(t.shape, t.dtype), types)
        summed, _ = lax.scan(add, zeros, signs)
        return finish(summed, len(outputs), 1 if samples is None else samples, len(signs))

    return ggn_of


def softmax_root(logits, label, z):
    """S z for the cross-entropy of logits [V] and a label: S = diag(√p) − p √pᵀ."""
    p = jax.nn.softmax(logits)
    root = jnp.sqrt(p)
    return root * z - p * jnp.sum(root * z)


def squared_root(output, target, z):
    """S z for the mean of squared differences over one example's n outputs: √(2 / n) z."""
    return jnp.reshape(z, output.shape) * (2 / output.size) ** 0.5


def _root_of(loss):
    def columns(output, *rest):
        *target, z = rest
        n = output.size

        def of_one(flat):
            return loss(flat.reshape(1, *output.shape), *(t[None] for t in target))

        values, vectors = jnp.linalg.eigh(jax.hessian(of_one)(output.reshape(n)))
        return (vectors @ (jnp.sqrt(jnp.maximum(values, 0)) * z)).reshape(output.shape)

    return columns


def _of_kind(kind, mode):
    """(what one sweep adds up, what the sums then are)."""
    if kind == "kronecker":
        return (
            lambda swept: swept.map(
                lambda f: kronecker_sums(f, mode), lambda p: kronecker_sums(None, mode, p)
            ),
            lambda summed, n, sweeps, runs=1: scaled(summed, n, sweeps, runs),
        )

    def over(summed, n, sweeps, runs=1):
        return tree_map(lambda s: s / (n * sweeps), summed)

    if kind == "diagonal":
        return lambda swept: swept.map(total_squares, jnp.zeros_like), over
    return lambda swept: swept.map(_block, lambda p: jnp.zeros((p.size, p.size), p.dtype)), over


def _block(form):
    g = wide(jax.vmap(lambda form: form.dense().reshape(-1))(form))
    return g.T @ g


def _examples(batch):
    return len(tree_leaves(batch)[0])


def _check(kind, mode):
    for name, got, allowed in (("kind", kind, KINDS), ("mode", mode, MODES)):
        if got not in allowed:
            raise ValueError(f"The {name} of curvature is one of {allowed}, got {got!r}.")
