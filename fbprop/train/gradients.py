"""The gradient of one batch, whole or in pieces, in the precision asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_map

from fbprop.core.factored import Rows, dense
from fbprop.learning.method import Method
from fbprop.optim.arguments import check_count
from fbprop.optim.objective import Weighted, call_loss, mean_of, means_of, number
from fbprop.optim.transform import scaled, wide, zeros
from fbprop.reverse import value_and_grad
from fbprop.train.precision import cast


class Gradients(NamedTuple):
    """What a step learns from its batch.

    Attributes:
      grads: like the trainable parameters.
      value: the loss, scalar.
      metrics: dict of arrays.
      model_state: the new one, or None.
      learning: the learning rule's memory, or None.
    """

    grads: Any
    value: jax.Array
    metrics: dict[str, Any]
    model_state: Any
    learning: Any = None


def gradients_of(
    loss: Callable, pieces: int, dtype, rows: bool, place, learning: Method | None = None,
    **engine,
) -> Callable:
    """``(held, params, batch, key, model_state, scale, memory) -> Gradients``.

    ``rows``: whether gradients may be `fbprop.Rows`, where nothing has to be done with them here.
    ``place``: where batches and gradients lie, a `Placement` or `Anywhere`.

    ``held`` are the parameters with None in place of those not differentiated; ``scale`` is the
    loss scale or None. Of a learning rule with this ``memory`` they are its direction.

    The gradient is that of the loss's sum, divided by its weight at the end: the same for one
    piece or many. A loss that is no `Weighted` has weight 1, so pieces of one size count the same.
    """
    scaled_sum = scaled_sum_of(loss, dtype)

    def of_piece(held, params, batch, *args, memory):
        args = place.batch(batch), *args
        if learning is not None:
            run = learning.value_and_grad(scaled_sum, has_aux=True, **engine)
            ((_, out), grads), memory = run(filled(held, params), *args, memory=memory)
            return place.gradients(_held(grads, held), params), out, memory
        differentiated = value_and_grad(
            lambda held: scaled_sum(filled(held, params), *args), has_aux=True,
            factored=Rows if rows and pieces == 1 else False, **engine
        )
        (_, out), grads = differentiated(held)
        return place.gradients(grads, params), out, memory

    def whole(held, params, batch, key, model_state, scale, memory):
        grads, out, memory = of_piece(
            held, params, batch, key, model_state, scale, memory=memory
        )
        weight = out.value if isinstance(out.value, Weighted) else None
        return Gradients(
            _divided(grads, held, weight, scale), mean_of(out.value), means_of(out.metrics),
            out.model_state, memory,
        )

    def in_pieces(held, params, batch, key, model_state, scale, memory):
        def one(carry, at):
            total, model_state, memory = carry
            grads, out, memory = of_piece(
                held, params, at[0], jax.random.fold_in(key, at[1]), model_state, scale,
                memory=memory,
            )
            total = tree_map(lambda t, g: t + wide(g), total, grads)
            return (total, out.model_state, memory), (out.value, out.metrics)

        start = place.gradients(tree_map(zeros, held), params), model_state, memory
        each = in_equal_pieces(batch, pieces), jnp.arange(pieces)
        (grads, model_state, memory), (values, metrics) = lax.scan(one, start, each)
        value, metrics = _over_pieces((values, metrics))
        weight = _total(values) if isinstance(values, Weighted) else Weighted(0.0, pieces)
        grads = _divided(grads, held, weight, scale)
        return Gradients(grads, value, metrics, model_state, memory)

    return whole if pieces == 1 else in_pieces


def scaled_sum_of(loss: Callable, dtype) -> Callable:
    """``(params, batch, key, model_state, scale) -> (what is differentiated, what the loss gave)``.
    """
    def scaled_sum(params, batch, key, model_state, scale):
        whole = cast(params, dtype)
        out = call_loss(loss, whole, cast(batch, dtype), key, model_state)
        total = out.value.sum if isinstance(out.value, Weighted) else out.value
        return total if scale is None else scaled(total, scale), out

    return scaled_sum


def check_pieces(pieces):
    check_count("accumulate", pieces)


def _divided(grads, held, weight: Weighted | None, scale):
    """Gradients of the scaled sum as those of the mean, in the parameters' dtypes."""
    if weight is None and scale is None:
        return grads
    dtype = jnp.result_type(float)
    factor = jnp.ones((), dtype) if weight is None else weight.inverse(dtype)
    factor = factor if scale is None else factor / scale.astype(dtype)
    return tree_map(lambda g, p: scaled(g, factor).astype(p.dtype), dense(grads), held)


def _over_pieces(stacked):
    """The mean over pieces of every array, and of a `Weighted` that of all it counts."""
    def one(m):
        if isinstance(m, Weighted):
            return _total(m).mean
        return jnp.mean(number(m), axis=0)

    return tree_map(one, stacked, is_leaf=lambda m: isinstance(m, Weighted))


def _total(stacked: Weighted) -> Weighted:
    return Weighted(jnp.sum(number(stacked.sum)), jnp.sum(number(stacked.weight)))


def in_equal_pieces(batch, pieces):
    """Every array [n, ...] as [pieces, n / pieces, ...]."""
    sizes = sorted({x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(batch)})
    if len(sizes) != 1 or sizes[0] % pieces or sizes == [0]:
        raise ValueError(
            f"Accumulation cuts a batch into equal pieces, got first axes of {sizes} expected one "
            f"length, a multiple of accumulate={pieces}."
        )
    return tree_map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)


def _held(grads, held):
    """The gradients of the parameters that are held."""
    return tree_map(
        lambda h, g: None if h is None else g, held, grads, is_leaf=lambda h: h is None
    )


def filled(params, full):
    """The holes of ``params`` filled from ``full``."""
    return tree_map(lambda p, f: f if p is None else p, params, full, is_leaf=lambda p: p is None)
