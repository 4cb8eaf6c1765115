"""Rules for gather, scatter and dynamic slices.

A gather and the scatter of the same dimension numbers move the same windows in opposite
directions, so each is the other's backward pass. Indices are all that is kept wherever the
operation is linear. ``mode`` says what becomes of indices out of bounds and is handed on: a window
that is dropped going forward gets and gives nothing going backward.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core import jaxcompat as jc
from fbprop.core import scatter
from fbprop.core.devices import at_lowering, in_words
from fbprop.core.factored import Rows
from fbprop.core.rule import Pair, Rule, Step, pair

# Bytes from which on XLA for a TPU is not to write log-probabilities for a few of them.
WRITTEN = 2**24


def _window_sizes(dims, operand_shape, updates_shape):
    """Sizes of the window that one update covers."""
    skipped = (*dims.inserted_window_dims, *dims.operand_batching_dims)
    window = iter(dims.update_window_dims)
    return [
        1 if d in skipped else updates_shape[next(window)] for d in range(len(operand_shape))
    ]


def _gather_windows(x, indices, updates_shape, params, fill=None):
    """The windows of ``x`` that a scatter with these parameters writes to.

    ``fill`` stands where the scatter drops the update; by default NaN, which equals nothing.
    """
    if x.size == 0:  # there is no place that one could be read from
        return jnp.full(updates_shape, jnp.nan if fill is None else fill, x.dtype)
    dims = params["dimension_numbers"]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=dims.update_window_dims, collapsed_slice_dims=dims.inserted_window_dims,
        start_index_map=dims.scatter_dims_to_operand_dims,
        operand_batching_dims=dims.operand_batching_dims,
        start_indices_batching_dims=dims.scatter_indices_batching_dims,
    )
    return lax.gather(
        x, indices, numbers, _window_sizes(dims, x.shape, updates_shape),
        indices_are_sorted=params["indices_are_sorted"], unique_indices=params["unique_indices"],
        mode=params["mode"], fill_value=fill,
    )


def _scatter(scatter, x, indices, updates, params):
    """Any of lax's scatters, with the parameters of a scatter equation."""
    return scatter(
        x, indices, updates, params["dimension_numbers"],
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"], mode=params["mode"],
    )


class Gather(Pair):
    """The cotangent is carried as rows, and becomes an array by `fbprop.core.scatter`."""

    def formulation(self, site):
        (x, indices), (y,) = site.in_avals, site.out_avals
        if site.platform == "tpu" and _picks_of_many(site):
            return "a sum of what is picked"
        form = scatter.formulation(x, indices.shape, y.shape, *_transposed(site.params))
        return form and in_words(site.platform, form, "cuda")

    def prepare(self, site):
        step, (y,) = super().prepare(site), site.out_avals
        if not _picks_of_many(site):
            return step
        numbers, options = _transposed(site.params)

        def on_tpu(x, indices):
            fill = site.params["fill_value"]
            return [scatter.picked(x, indices, numbers, options["mode"], fill).reshape(y.shape)]

        def forward(x, indices):
            as_it_stands = lambda *xs: jc.bind(site.eqn, [*xs])
            if not isinstance(x, jax.core.Tracer):  # it is written already
                return as_it_stands(x, indices), ()
            return at_lowering(
                x, indices, default=as_it_stands, several=("tpu",), tpu=on_tpu), ()

        return step._replace(forward=forward)


def _picks_of_many(site):
    """Whether labels pick of logits so large that a TPU should not write them for that."""
    x, indices = site.in_avals
    numbers, _ = _transposed(site.params)
    return jc.nbytes(x) >= WRITTEN and scatter.is_one_each(x.shape, indices, numbers)


def _gather(site, kept, dy):
    return [Rows(*kept, dy, site.in_avals[0].shape, *_transposed(site.params)), None]


def _transposed(gather):
    """Dimension numbers and options of the scatter that a gather's transpose is."""
    dims = gather["dimension_numbers"]
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=dims.offset_dims, inserted_window_dims=dims.collapsed_slice_dims,
        scatter_dims_to_operand_dims=dims.start_index_map,
        operand_batching_dims=dims.operand_batching_dims,
        scatter_indices_batching_dims=dims.start_indices_batching_dims,
    )
    return numbers, {n: gather[n] for n in ("indices_are_sorted", "unique_indices", "mode")}


def _added(site, kept, dy):
    du = None
    if site.reached[2]:
        du = _gather_windows(dy, kept[0], site.in_avals[2].shape, site.params, fill=0)
    return dy, None, du


def _subtracted(site, kept, dy):
    dx, _, du = _added(site, kept, dy)
    return dx, None, None if du is None else -du


def _indices_for_updates(site):
    return (1,) if site.reached[2] else ()


def _multiplied_keep(site):
    """x̄ needs the updates, ū needs x, and the updates if several may meet; both the indices."""
    du = site.reached[2]
    updates = site.reached[0] or (du and not site.params["unique_indices"])
    return [i for i, r in enumerate((du, True, updates)) if r]


def _multiplied(site, kept, dy):
    x, indices, updates = map(dict(zip(_multiplied_keep(site), kept)).get, range(3))
    dx = du = None
    if site.reached[0]:
        dx = _scatter(lax.scatter_mul, dy, indices, updates, site.params)
    if site.reached[2]:
        shape = site.in_avals[2].shape
        du = _gather_windows(dy * x, indices, shape, site.params, fill=0)
        if not site.params["unique_indices"]:
            places = lax.iota(jnp.int32, x.size).reshape(x.shape)
            places = _gather_windows(places, indices, shape, site.params, fill=-1)
            du = du * _product_of_others(updates, places)
    return dx, None, du


def _product_of_others(values, places):
    """Per element, the product of the others at the same place: nothing is divided by.

    In the order of their places: those before it in its run, times those after it.
    """
    flat = places.reshape(-1)
    order = jnp.argsort(flat)
    at, sorted_values = flat[order], values.reshape(-1)[order]
    before = _running_product(at, sorted_values)
    after = _running_product(at[::-1], sorted_values[::-1])[::-1]
    back = jnp.zeros_like(order).at[order].set(lax.iota(order.dtype, order.size))
    return (before * after)[back].reshape(values.shape)


def _running_product(at, values):
    """Products of what stands before each element in a run of equal places."""
    starts = jnp.concatenate([jnp.ones(1, bool), at[1:] != at[:-1]])[:at.size]
    one = jnp.ones_like(values)
    earlier = jnp.where(starts, one, jnp.concatenate([one[:1], values[:-1]]))

    def combine(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], a[1] * b[1])

    return lax.associative_scan(combine, (starts, earlier))[1]


def _extremum(site, kept, dy):
    """ȳ shared equally among the operand and all updates that attain the result."""
    x, indices, updates, out = kept
    zero, params = jnp.zeros((), dy.dtype), site.params
    stays, wins = x == out, updates == _gather_windows(out, indices, updates.shape, params)
    # Counted as integers: bfloat16 counts no further than 256.
    count = _scatter(
        lax.scatter_add, stays.astype(jnp.int32), indices, wins.astype(jnp.int32), params
    )
    share = dy / jnp.maximum(count, 1).astype(dy.dtype)
    du = _gather_windows(share, indices, updates.shape, params, fill=0)
    return jnp.where(stays, share, zero), None, jnp.where(wins, du, zero)


class Overwrite(Rule):
    """Scatter: among updates of one element one wins, the same forward and backward.

    Which one is the platform's choice, so where updates may meet and their cotangent is asked for,
    the forward settles it: numbers are scattered in place of the updates, those that are found
    again have won, and the others are left out of the result.
    """

    def keeps(self):
        return "indices; which updates won, if the indices may repeat"

    def declared(self, site):
        return None if self._may_meet(site) else (1,)

    @staticmethod
    def _may_meet(site):
        return site.reached[2] and not site.params["unique_indices"]

    def prepare(self, site):
        if site.params["update_jaxpr"] is not None:
            raise NotImplementedError(
                "A scatter that applies a function has no derivative, got update_jaxpr expected "
                f"None{site.location()}: gather, apply the function, and scatter the results."
            )
        params, updates_aval = site.params, site.in_avals[2]

        def backward(kept, wins, dys):
            (indices,), (dy,), dx, du = kept, dys, None, None
            if site.reached[0]:
                zeros = jnp.zeros(updates_aval.shape, dy.dtype)
                dx = _scatter(lax.scatter, dy, indices, zeros, params)
            if site.reached[2]:
                du = _gather_windows(dy, indices, updates_aval.shape, params, fill=0)
                du = du if wins is None else jnp.where(wins, du, jnp.zeros((), dy.dtype))
            return dx, None, du

        return Step((1,), backward, _scatter_with_winners(params) if self._may_meet(site) else None)


def _scatter_with_winners(params):
    def forward(x, indices, updates):
        # Numbered from 1, which leaves 0 to what no update meets.
        number = lax.broadcasted_iota(jnp.int32, (updates.size, 1), 0).reshape(updates.shape) + 1
        last = _scatter(lax.scatter, jnp.zeros(x.shape, jnp.int32), indices, number, params)
        wins = number == _gather_windows(last, indices, updates.shape, params, fill=0)
        kept = jnp.where(last == 0, x, jnp.zeros((), x.dtype))
        won = jnp.where(wins, updates, jnp.zeros((), x.dtype))
        return [_scatter(lax.scatter_add, kept, indices, won, params)], wins

    return forward


# Starts have been counted from the front already: a negative one is clamped, not counted again.
_read = functools.partial(lax.dynamic_slice, allow_negative_indices=False)
_write = functools.partial(lax.dynamic_update_slice, allow_negative_indices=False)


def _dynamic_slice(site, starts, dy):
    zeros = jnp.zeros(site.in_avals[0].shape, dy.dtype)
    return [_write(zeros, dy, starts), *(None for _ in starts)]


def _dynamic_update_slice(site, starts, dy):
    shape, dx, du = site.in_avals[1].shape, None, None
    if site.reached[0]:
        dx = _write(dy, jnp.zeros(shape, dy.dtype), starts)
    if site.reached[1]:
        du = _read(dy, starts, shape)
    return [dx, du, *(None for _ in starts)]


RULES = [
    Gather(
        "gather", "y = windows of x at indices;  x̄ = Σ of ȳ's windows in their places. Keeps the "
        "indices.",
        _gather, keep=lambda site: (1,), keeps="indices",
    ),
    pair(
        "scatter-add", "y = x, updates added at indices;  x̄ = ȳ, ū = ȳ at indices. Keeps the "
        "indices.",
        _added, keep=_indices_for_updates, keeps="indices, for updates",
    ),
    pair(
        "scatter-sub", "y = x, updates subtracted at indices;  x̄ = ȳ, ū = −ȳ at indices. Keeps "
        "the indices.",
        _subtracted, keep=_indices_for_updates, keeps="indices, for updates",
    ),
    pair(
        "scatter-mul", "y = x, multiplied by updates at indices;  x̄ = ȳ likewise multiplied, ū = "
        "ȳ x at indices, times the other updates there, if indices repeat. Keeps indices, updates "
        "for x̄, x for ū, and updates for ū if indices may repeat.",
        _multiplied, keep=_multiplied_keep, keeps="indices; updates for x, x for updates",
    ),
    *(
        pair(
            f"scatter-{name}", f"y = {name}(x, updates at indices);  ȳ goes to what attains y. "
            "Ties, also between updates of one element, share it equally, as JAX. Keeps all.",
            _extremum, keep=lambda site: (0, 1, 2, 3), keeps="x, indices, updates, y",
        )
        for name in ("min", "max")
    ),
    Overwrite(
        "scatter", "y = x, with updates at indices;  x̄ = ȳ, 0 at indices, ū = ȳ at indices, 0 for "
        "updates that another one overwrote.",
        _scatter_with_winners,
    ),
    pair(
        "dynamic_slice", "y = x[start : start + size];  x̄ = ȳ in its place, 0 elsewhere. Keeps "
        "the starts.",
        _dynamic_slice, keep=lambda site: range(1, len(site.in_avals)), keeps="starts",
    ),
    pair(
        "dynamic_update_slice", "y = x, with u at start;  x̄ = ȳ, 0 there, ū = ȳ there. Keeps the "
        "starts.",
        _dynamic_update_slice, keep=lambda site: range(2, len(site.in_avals)), keeps="starts",
    ),
]
