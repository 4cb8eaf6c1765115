"""Rules for reductions over some dimensions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.core import cotangent as ct
from fbprop.core.jaxcompat import differentiable
from fbprop.core.rule import linear, no_gradient, pair, rule


def _expand(dy, axes, shape):
    """A reduced array, spread again over the axes it was reduced over."""
    return lax.broadcast_in_dim(dy, shape, [d for d in range(len(shape)) if d not in axes])


def _extremum(dy, x, out, *, axes):
    hit = (x == _expand(out, axes, x.shape)).astype(dy.dtype)
    return hit * _expand(dy / jnp.sum(hit, axes), axes, x.shape)


def _rest(ndim, axes):
    return [d for d in range(ndim) if d not in axes]


def _rows(x, axes):
    """The axes first and as one, so that the reduction is over rows."""
    rest = _rest(x.ndim, axes)
    n = math.prod(x.shape[d] for d in axes)
    return lax.reshape(lax.transpose(x, (*axes, *rest)), (n, *(x.shape[d] for d in rest)))


def _unrows(rows, axes, shape):
    order = (*axes, *_rest(len(shape), axes))
    return lax.transpose(lax.reshape(rows, [shape[d] for d in order]), np.argsort(order))


def _through_tree(xs, dys, combine, pull):
    """Cotangents of the rows of a reduction, done and undone by halving.

    Reduces x to half as many rows, gets their cotangents by the same way, and pulls these back
    through the one step: 2n steps altogether, none of which divides, so zeros need no care.

    Args:
      xs: arrays with the rows to reduce as first dimension; dys: cotangents of the results.
      combine: (rows, rows) -> rows; pull: (rows, rows, cotangents) -> their cotangents.
    """
    n = xs[0].shape[0]
    if n < 2:
        return [jnp.broadcast_to(dy, (n, *dy.shape)) for dy in dys]
    half = n // 2
    a, b, odd = zip(*(lax.split(x, (half, half, n - 2 * half)) for x in xs))
    merged = [lax.concatenate(pair, 0) for pair in zip(combine(a, b), odd)]
    inner, tail = zip(*(
        lax.split(d, (half, n - 2 * half)) for d in _through_tree(merged, dys, combine, pull)
    ))
    da, db = pull(a, b, inner)
    return [lax.concatenate(parts, 0) for parts in zip(da, db, tail)]


def _product(dy, x, *, axes):
    def pull(a, b, d):
        return [d[0] * b[0]], [d[0] * a[0]]

    rows = _through_tree([_rows(x, axes)], [dy], lambda a, b: [a[0] * b[0]], pull)
    return _unrows(rows[0], axes, x.shape)


def _reduce(site, kept, *dys):
    """The initial values are one more row; the reducer is pulled back by the engine."""
    n, axes, engine = len(dys), site.params["dimensions"], site.engine
    moving = [differentiable(a) for a in site.in_avals[:n]]
    plan = engine.plan(site.params["jaxpr"], moving * 2, moving, site.path)
    xs = [_with_initial(x, v, axes) for x, v in zip(kept[:n], kept[n:])]

    def over_rows(step):
        for _ in range(xs[0].ndim):
            step = jax.vmap(step)
        return step

    def pull(a, b, d):
        d = iter(d)
        douts = [next(d) if m else ct.ZERO for m in moving]
        dins = engine.backward(plan, engine.forward(plan, [*a, *b])[1], douts)
        dins = [ct.dense(di, x) for di, x, m in zip(dins, (*a, *b), moving * 2) if m]
        return dins[:sum(moving)], dins[sum(moving):]

    combine = over_rows(lambda a, b: engine.forward(plan, [*a, *b])[0])
    dys = [dy for dy, m in zip(dys, moving) if m]
    dxs = iter(_through_tree(xs, dys, combine, over_rows(pull)))
    dxs = [next(dxs) if m else None for m in moving]
    return [
        *(None if d is None else _unrows(d[1:], axes, x.shape) for d, x in zip(dxs, kept)),
        *(None if d is None else jnp.sum(d[0]) for d in dxs),
    ]


def _with_initial(x, initial, axes):
    rows = _rows(x, axes)
    return lax.concatenate([jnp.broadcast_to(initial, (1, *rows.shape[1:])), rows], 0)


RULES = [
    linear(
        "reduce_sum", "y = Σ x;  x̄ = ȳ, repeated",
        lambda dy, *, axes, x_aval: _expand(dy, axes, x_aval.shape),
    ),
    rule(
        "reduce_max", "y = max x;  x̄ = ȳ on the maxima. Ties share it equally, as JAX. Keeps x, y.",
        x=_extremum,
    ),
    rule(
        "reduce_min", "y = min x;  x̄ = ȳ on the minima. Ties share it equally, as JAX. Keeps x, y.",
        x=_extremum,
    ),
    rule(
        "reduce_prod", "y = Π x;  x̄ = ȳ Π of the others, by halving and without a division, so "
        "that it holds at zeros too. Keeps x.",
        x=_product,
    ),
    pair(
        "reduce", "y = x₁ ∘ x₂ ∘ ... for a reducer ∘ of the user's;  x̄ by halving, ∘ "
        "differentiated by the table. Keeps operands and initial values.",
        _reduce, keep=lambda site: range(len(site.in_avals)), keeps="all operands",
    ),
    *no_gradient("An index: discrete, no gradient.", "argmax", "argmin"),
    *no_gradient(
        "A reduction of booleans or bits: no gradient.", "reduce_and", "reduce_or", "reduce_xor"
    ),
]
