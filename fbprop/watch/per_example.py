"""Norms, clipped sums and moments of each example's gradient, without a gradient per example.

``loss(params, *batch)`` is a mean over the batch, as in training; the gradients meant here are
those of each example's own loss, whose mean is the loss's gradient. One backward sweep leaves them
in factors (`fbprop.watch.factors`), of which norms and sums are made; for a parameter that leaves
none, a gradient per example is made, of it alone: `explain` says of which.

Examples must not meet before the mean: batch statistics, negatives from the batch, or random
numbers for the whole batch are errors that say where. A key per example in the batch is fine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves, tree_map, tree_unflatten

from fbprop.watch.example_sweep import sweep
from fbprop.watch.factors import gram, total_squares, wide


class Norms(NamedTuple):
    """Norms of the gradients of B examples.

    Attributes:
      total: [B], over all parameters.
      each: a pytree like the parameters, of [B].
      values: [B], the examples' losses.
    """

    total: jax.Array
    each: Any
    values: jax.Array


def norms(
    loss: Callable, *, has_aux: bool = False, rules=None, at_once: int | None = None
) -> Callable:
    """The norm of each example's gradient, per parameter and in all.

    Args:
      loss: ``(params, *batch) -> scalar``, a mean over examples; parameters are a pytree of
        floating-point arrays, the batch pytrees of arrays whose first dimension is the batch.
      has_aux: it returns ``(scalar, aux)``.
      rules: the table of rules; default `fbprop.table`.
      at_once: how many examples are worked through at once, a divisor of the batch's size; default:
        all, in programs for one device as many as take 64 MiB.

    Returns:
      A function ``(params, *batch) -> Norms``. It works under `jit` and `vmap`.

    Raises:
      ValueError: examples of a batch meet before the mean of their losses, the loss fails for
        another size of the batch, or the batch's arrays have different sizes.
      TypeError: a parameter is not of floating-point numbers, or the loss is not a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop.watch import per_example
      >>> def loss(w, x):
      ...     return jnp.mean(x @ w)
      >>> per_example.norms(loss)(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 1.0]])).total.tolist()
      [5.0, 1.0]
    """

    def norms_of(params, *batch):
        def consume(swept):
            return (swept.squares(), swept.values), ()

        (squares, values), _ = sweep(consume, loss, params, batch, has_aux, rules, at_once)
        return Norms(_norm(squares, values), tree_map(jnp.sqrt, squares), values)

    return norms_of


class ClippedSum(NamedTuple):
    """A sum of gradients, each clipped.

    Attributes:
      gradient: Σ gᵢ min(1, bound / ‖gᵢ‖) + noise, like the parameters.
      norms: [B], before clipping; values: [B], the examples' losses.
    """

    gradient: Any
    norms: jax.Array
    values: jax.Array


def clipped_sum(
    loss: Callable, bound: float, *, noise: float = 0.0, has_aux: bool = False, rules=None,
    at_once: int | None = None,
) -> Callable:
    """The sum over examples of their gradients, each scaled down to a norm of at most ``bound``.

    What DP-SGD (Abadi et al., arXiv 1607.00133) adds noise to. The second backward sweep of fast
    gradient clipping (Lee and Kifer, arXiv 2009.03106) is not needed: a gradient is linear in its
    factors, so that one sweep's factors give norms first, and then, scaled, the sum (Bu et al.,
    arXiv 2210.00038).

    Args:
      loss, has_aux, rules, at_once: see `norms`.
      bound: largest norm of a clipped gradient, over all parameters; it and noise may be traced.
      noise: standard deviation of Gaussian noise added to every element of the sum, in units of
        ``bound``.

    Returns:
      A function ``(params, *batch, key=None) -> ClippedSum``; with noise it needs a key. Divide by
      the expected size of the batch for a step.

    Raises:
      ValueError: the bound is not positive, the noise negative, or there is noise without a key;
        and as `norms`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop.watch import per_example
      >>> def loss(w, x):
      ...     return jnp.mean(x @ w)
      >>> x = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> clipped = per_example.clipped_sum(loss, 1.0)(jnp.ones(2), x)
      >>> [round(float(g), 3) for g in clipped.gradient], clipped.norms.tolist()
      ([0.6, 1.3], [5.0, 0.5])
    """
    _check_bound(bound, noise)
    noisy = isinstance(noise, jax.Array) or noise > 0

    def clipped(params, *batch, key=None):
        if noisy and key is None:
            raise ValueError(
                f"Noise is drawn with a key, got noise={noise} and no key: call with key=..."
            )

        def consume(swept):
            norm = _norm(swept.squares(), swept.values)
            scale = jnp.minimum(1.0, bound / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            return (norm, swept.values), swept.total(scale)

        (norm, values), gradient = sweep(
            consume, loss, params, batch, has_aux, rules, at_once
        )
        if noisy:
            gradient = _noisy(gradient, noise * bound, key)
        return ClippedSum(gradient, norm, values)

    return clipped


class Moments(NamedTuple):
    """How gradients differ between B examples.

    Attributes:
      mean: the loss's gradient, like the parameters.
      variance: of each element over examples, unbiased (divided by B - 1), like the parameters.
      signal_to_noise: per parameter, ‖mean‖² over the variance of that mean's elements in all.
      noise_scale: the simple gradient noise scale, tr Σ / ‖G‖², from unbiased estimates of both
        (McCandlish et al., arXiv 1812.06162): the batch size at which noise is as large as signal;
        negative where the batch is too small to tell.
      values: [B], the examples' losses.
    """

    mean: Any
    variance: Any
    signal_to_noise: Any
    noise_scale: jax.Array
    values: jax.Array


def moments(
    loss: Callable, *, has_aux: bool = False, rules=None, at_once: int | None = None
) -> Callable:
    """Mean and variance of gradients over examples, signal-to-noise, the gradient noise scale.

    The variance of a weight that is used once per example is one product of squared factors;
    others' squares are added up from one example's array at a time.

    Args:
      loss, has_aux, rules, at_once: see `norms`.

    Returns:
      A function ``(params, *batch) -> Moments``; with one example variances are nan.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop.watch import per_example
      >>> def loss(w, x):
      ...     return jnp.mean(x * w)
      >>> found = per_example.moments(loss)(jnp.float32(0), jnp.array([1.0, 3.0]))
      >>> float(found.mean), float(found.variance), float(found.noise_scale)
      (2.0, 2.0, 0.6666666865348816)
    """

    def moments_of(params, *batch):
        def consume(swept):
            sums = swept.total(jnp.ones_like(swept.values))
            return swept.values, (sums, swept.map(total_squares, jnp.zeros_like))

        values, (sums, squares) = sweep(consume, loss, params, batch, has_aux, rules, at_once)
        n = len(values)
        mean = tree_map(lambda s: s / n, sums)

        def variance(square, m):
            return jnp.maximum(square / n - m * m, 0.0) * (n / (n - 1) if n > 1 else jnp.nan)

        variances = tree_map(variance, squares, mean)
        signal = tree_map(lambda m: jnp.sum(m * m), mean)
        spread = tree_map(jnp.sum, variances)
        trace, length = sum(tree_leaves(spread)), sum(tree_leaves(signal))
        return Moments(
            mean, variances, tree_map(lambda s, v: s / (v / n), signal, spread),
            trace / (length - trace / n), values,
        )

    return moments_of


def cosines(loss: Callable, *, has_aux: bool = False, rules=None) -> Callable:
    """The cosine of the angle between the gradients of every pair of examples.

    Args:
      loss, has_aux, rules: see `norms`.

    Returns:
      A function ``(params, *batch) -> [B, B]``; 0 for a gradient that is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop.watch import per_example
      >>> def loss(w, x):
      ...     return jnp.mean(x @ w)
      >>> per_example.cosines(loss)(jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    def cosines_of(params, *batch):
        def consume(swept):
            return (), sum(gram(form) for form in swept.forms if form is not None)

        _, products = sweep(consume, loss, params, batch, has_aux, rules, _size(batch))
        length = jnp.sqrt(jnp.diagonal(products))
        both = length[:, None] * length
        return jnp.where(both > 0, products / jnp.where(both > 0, both, 1.0), 0.0)

    return cosines_of


class Line(NamedTuple):
    """How one parameter's norms are made: its path, shape, and in words of what."""

    path: str
    shape: tuple[int, ...]
    formulation: str


class Formulations(NamedTuple):
    """What `explain` found, a line per parameter; ``str()`` of it is a table."""

    lines: tuple[Line, ...]

    def __str__(self):
        rows = [("parameter", "shape", "norms from")]
        rows += [(x.path, str(list(x.shape)), x.formulation) for x in self.lines]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in rows)


def explain(loss: Callable, *, has_aux: bool = False, rules=None) -> Callable:
    """Of what each parameter's norms are made: factors, or its own gradient per example.

    Args:
      loss, has_aux, rules: see `norms`.

    Returns:
      A function ``(params, *batch) -> Formulations``; nothing is computed.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop.watch import per_example
      >>> def loss(params, x):
      ...     return jnp.mean(x @ params["w"] + params["b"])
      >>> params = {"b": jnp.ones(3), "w": jnp.ones((2, 3))}
      >>> print(per_example.explain(loss)(params, jnp.ones((4, 2))))
      parameter  shape   norms from
      ['b']      [3]     its own gradient
      ['w']      [2, 3]  norms of two factors
    """

    def explanation(params, *batch):
        lines = []

        def consume(swept):
            for path, parameter, form in zip(swept.paths, swept.parameters, swept.forms):
                said = ["nothing: it is 0"]
                if form is not None:
                    jax.eval_shape(jax.vmap(lambda f: said.append(f.formulation())), form)
                lines.append(Line(path, parameter.shape, said[-1]))
            return (), ()

        def swept(params, batch):
            sweep(consume, loss, params, batch, has_aux, rules, _size(batch))

        jax.eval_shape(swept, params, batch)
        return Formulations(tuple(lines))

    return explanation


def _norm(squares, values):
    return jnp.sqrt(sum(tree_leaves(squares), jnp.zeros(values.shape, wide(values).dtype)))


def _size(batch):
    """Of a batch: all of it at once."""
    return max([jnp.shape(x)[0] for x in tree_leaves(batch)[:1] if jnp.ndim(x)], default=1) or None


def _check_bound(bound, noise):
    if not isinstance(bound, jax.Array) and not bound > 0:
        raise ValueError(f"The bound on a norm is positive, got {bound!r}: 1.0 is usual.")
    if not isinstance(noise, jax.Array) and noise < 0:
        raise ValueError(
            f"Noise is a standard deviation in units of the bound, got {noise!r} expected 0 "
            "or more."
        )


def _noisy(gradient, deviation, key):
    leaves, tree = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    return tree_unflatten(tree, [
        x + jnp.asarray(deviation, x.dtype) * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys)
    ])
