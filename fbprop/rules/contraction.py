"""Rules for contractions: matrix products of any dimensions."""

from __future__ import annotations

import numpy as np
from jax import lax

from fbprop.core.devices import in_words
from fbprop.core.factored import Contraction, exchanged
from fbprop.core.jaxcompat import explicit_sharding
from fbprop.core.rule import Pullbacks, pair


def _free(ndim, *used):
    return [d for d in range(ndim) if not any(d in u for u in used)]


def _cotangent(aval, dy, other, mine, theirs, dy_free, **options):
    """ȳ contracted with the other operand over what only that one brought into the result.

    The order of the factors is chosen here so that the product needs no transpose, if there is one.
    The weight of ``x @ w``, x of rank 3: x̄ᵀȳ over 4096 = 16 · 256 positions to 256 x 1024 takes
    21 ms; ȳᵀx and a transpose, JAX's form, 47 ms, because it copies ȳ (one core, float32). A layer
    forward and backward takes .69 of `jax.grad`'s time.

    Args:
      aval: the type of the operand whose cotangent this is. An explicit sharding in it is asked
        for, as a product over a sharded dimension has none of its own.
      mine, theirs: (contracted, batch) dimensions of the operand whose cotangent this is, and of
        the other.
      dy_free: where the other's free dimensions are in ``dy``.
      options: precision and result type, as in the forward, ȳ in the place of the operand. (16-bit
        products with a 16-bit result are accumulated in float32 by XLA itself, on CPU as on
        accelerators.)
    """
    (contracted, batch), (contracted_other, batch_other) = mine, theirs
    n_batch, n_free = len(batch), dy.ndim - len(batch) - len(dy_free)
    free = _free(n_batch + n_free + len(contracted), contracted, batch)
    # What is left of the other operand are its contracted dimensions, in its own order.
    left = [contracted[i] for i in np.argsort(contracted_other)]
    dy = dy, dy_free, list(range(n_batch))
    other = other, _free(other.ndim, contracted_other, batch_other), list(batch_other)
    order, factors = [*batch, *left, *free], (other, dy)
    if order != sorted(order):
        order, factors = [*batch, *free, *left], (dy, other)
    else:
        options["precision"] = exchanged(options["precision"])
    (x, over_x, batch_x), (y, over_y, batch_y) = factors
    if explicit_sharding(aval):
        options["out_sharding"] = explicit_sharding(aval, order)
    return Contraction(x, y, (over_x, over_y), (batch_x, batch_y), order, options)


def _dot_general_a(dy, b, *, a_aval, dimension_numbers, precision, preferred_element_type):
    (ca, cb), (ba, bb) = dimension_numbers
    b_free = b.ndim - len(cb) - len(bb)
    return _cotangent(
        a_aval, dy, b, (ca, ba), (cb, bb), list(range(dy.ndim - b_free, dy.ndim)),
        precision=precision, preferred_element_type=preferred_element_type,
    )


def _dot_general_b(dy, a, *, b_aval, dimension_numbers, precision, preferred_element_type):
    (ca, cb), (ba, bb) = dimension_numbers
    return _cotangent(
        b_aval, dy, a, (cb, bb), (ca, ba), list(range(len(ba), a.ndim - len(ca))),
        precision=exchanged(precision), preferred_element_type=preferred_element_type,
    )


class Product(Pullbacks):
    """Its cotangents are carried as factors, and become arrays by `Contraction.dense`."""

    def formulation(self, site):
        (a, b), (dy,) = site.in_avals, site.out_avals
        params = {
            n: site.params[n] for n in ("dimension_numbers", "precision", "preferred_element_type")
        }
        found = {
            "ā": _dot_general_a(dy, b, a_aval=a, **params).formulation(),
            "b̄": _dot_general_b(dy, a, b_aval=b, **params).formulation(),
        }
        said = [
            (x, in_words(site.platform, how, "cpu"))
            for (x, how), r in zip(found.items(), site.reached) if r and how
        ]
        return ", ".join(f"{x} {how}" for x, how in said if how)


def _ragged(site, kept, dy):
    """Rows of x meet the matrix of their group, or the ragged dimension is summed by group."""
    x, w, sizes = kept
    dims = site.params["ragged_dot_dimension_numbers"]
    (cx, cw), (bx, bw) = dims.dot_dimension_numbers
    (row,), group = dims.lhs_ragged_dimensions, list(dims.rhs_group_dimensions)
    _check_ragged(site, row in bx, row)
    free_x, free_w = _free(x.ndim, cx, bx), _free(w.ndim, cw, bw, group)
    left_x, left_w = [cx[i] for i in np.argsort(cw)], [cw[i] for i in np.argsort(cx)]
    # Dimensions of ȳ: the group if it was summed by group, batch, free ones of x, of w.
    first, last = 1 if row in cx else 0, dy.ndim - len(free_w)
    precision = site.params["precision"]
    batch = list(range(first, first + len(bx)))
    dy_x, dy_w = list(range(first + len(bx), last)), list(range(last, dy.ndim))
    if row in cx:
        over, at, groups = ((free_w, dy_w), (bw, batch)), cw[list(cx).index(row)], [0]
        to_x = w, dy, sizes, over, at, groups, [*bx, *left_x, *free_x], exchanged(precision)
    else:
        over, at, groups = ((dy_w, free_w), (batch, bw)), dy_x[free_x.index(row)], []
        to_x = dy, w, sizes, over, at, group, [*bx, *free_x, *left_x], precision
    over = (free_x, dy_x), (bx, batch)
    to_w = x, dy, sizes, over, row, groups, [*group, *bw, *left_w, *free_w], precision
    wanted = zip((to_x, to_w), site.reached)
    return [*(_by_group(site, *product) if r else None for product, r in wanted), None]


def _check_ragged(site, in_batch, row):
    if in_batch:
        raise NotImplementedError(
            "A ragged product is differentiated where its ragged dimension is free or contracted, "
            f"got batch dimension {row} of the left operand{site.location()}: use dot_general."
        )


def _by_group(site, x, w, sizes, over, row, group, order, precision):
    """A ragged product whose result's dimensions are those of an operand, in this order."""
    out = lax.ragged_dot_general(
        x, w, sizes, lax.RaggedDotDimensionNumbers(over, [row], group),
        precision=precision, preferred_element_type=site.params["preferred_element_type"],
    )
    return lax.transpose(out, np.argsort(order))


RULES = [
    Product(
        "dot_general",
        "y = Σ a b over the contracted dimensions;  ā = Σ ȳ b over b's free ones, b̄ = Σ a ȳ over "
        "a's.  Keeps the other operand.",
        {"a": _dot_general_a, "b": _dot_general_b},
    ),
    pair(
        "ragged_dot_general",
        "y = Σ x w, each row of x with the matrix w of its group;  x̄ = Σ ȳ w likewise, w̄ = Σ x ȳ "
        "within each group, and the same the other way round.  Keeps x, w, group sizes.",
        _ragged, keep=lambda site: (0, 1, 2), keeps="x, w, group sizes",
    ),
]
