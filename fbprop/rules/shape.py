"""Rules for operations that move elements without changing them.

All are linear, so nothing is kept: the backward pass moves every cotangent back to where its
element came from, and adds up the cotangents of an element that went to several places.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbprop.core import cotangent as ct
from fbprop.core.devices import summed
from fbprop.core.factored import Contraction
from fbprop.core.jaxcompat import differentiable
from fbprop.core.rule import Pullbacks, linear, no_gradient, pair, rule
from fbprop.core.tap import TAP


def _broadcast_in_dim(dy, *, broadcast_dimensions, x_aval):
    kept = [d for d, n in zip(broadcast_dimensions, x_aval.shape) if dy.shape[d] == n]
    over = tuple(d for d in range(dy.ndim) if d not in kept)
    return lax.reshape(summed(dy, over), x_aval.shape)


def _tile(dy, *, reps, x_aval):
    """Dimension of size r·n is r rows of n: sum over the rows."""
    rows = lax.reshape(dy, [k for pair in zip(reps, x_aval.shape) for k in pair])
    return jnp.sum(rows, tuple(range(0, rows.ndim, 2)))


def _reshape(dy, *, x_aval, dimensions=None):
    if dimensions is None:
        return lax.reshape(dy, x_aval.shape)
    permuted = lax.reshape(dy, [x_aval.shape[d] for d in dimensions])
    return lax.transpose(permuted, np.argsort(dimensions))


class Transpose(Pullbacks):
    """Of a product that is not done yet, the order of its dimensions is all that changes."""

    takes_factored = True


def _transpose(dy, *, permutation):
    back = np.argsort(permutation).tolist()
    if isinstance(dy, Contraction):
        return dy.transposed(back)
    return lax.transpose(ct.evaluated(dy), back)


def _slice(dy, *, start_indices, limit_indices, strides, x_aval):
    strides = strides or (1,) * dy.ndim
    config = [
        (lo, n - lo - (d - 1) * s - 1 if d else n - lo, s - 1)
        for lo, n, d, s in zip(start_indices, x_aval.shape, dy.shape, strides)
    ]
    return lax.pad(dy, np.zeros((), dy.dtype), config)


def _pad_operand(dy, *, padding_config):
    """Crop what was padded, put zeros where a negative padding cropped, skip the interior."""
    low, high, interior = zip(*padding_config) if padding_config else ((), (), ())
    edges = [(-lo, -hi, 0) for lo, hi in zip(low, high)]
    within = lax.pad(dy, np.zeros((), dy.dtype), edges)
    return lax.slice(within, [0] * dy.ndim, within.shape, [i + 1 for i in interior])


def _pad_value(dy, *, padding_config, x_aval):
    """Sum over the padded places only: Σȳ − Σx̄, JAX's form, loses digits when x is large."""
    padded = lax.pad(jnp.zeros(x_aval.shape, bool), np.True_, padding_config)
    return jnp.sum(jnp.where(padded, dy, np.zeros((), dy.dtype)))


def _concatenate(site, _, dy):
    axis = site.params["dimension"]
    return lax.split(dy, [a.shape[axis] for a in site.in_avals], axis)


def _optimization_barrier(site, _, *dys):
    """The cotangents that exist, behind one barrier, in their places."""
    real = [i for i, a in enumerate(site.in_avals) if differentiable(a)]
    behind = dict(zip(real, lax.optimization_barrier([dys[i] for i in real])))
    return [behind.get(i) for i in range(len(dys))]


def _device_put(site, _, *dys):
    """Each cotangent goes back to where its operand came from, as far as that is known."""
    homes = [
        a.memory_space if src is None and a.memory_space != out.memory_space else src
        for src, a, out in zip(site.params["srcs"], site.in_avals, site.out_avals)
    ]
    return [
        dy if ct.is_zero(dy) or home is None else jax.device_put(dy, home)
        for dy, home in zip(dys, homes)
    ]


def _likewise(name, math):
    """The same primitive, with the same parameters, on the cotangent."""
    return pair(name, math, lambda site, _, dy: [site.eqn.primitive.bind(dy, **site.params)])


RULES = [
    linear(
        "broadcast_in_dim", "y = x repeated along new or unit dimensions;  x̄ = ȳ summed over them",
        _broadcast_in_dim,
    ),
    linear("tile", "y = x repeated as blocks;  x̄ = ȳ summed over the blocks", _tile),
    linear("reshape", "y = x, elements in the same order;  x̄ = ȳ reshaped back", _reshape),
    linear(
        "squeeze", "y = x without unit dimensions;  x̄ = ȳ with them",
        lambda dy, *, x_aval: lax.reshape(dy, x_aval.shape),
    ),
    Transpose(
        "transpose", "y = x permuted;  x̄ = ȳ permuted back", {"x": _transpose},
    ),
    linear(
        "rev", "y = x reversed;  x̄ = ȳ reversed",
        lambda dy, *, dimensions: lax.rev(dy, dimensions),
    ),
    linear("slice", "y = x[lo:hi:step];  x̄ = ȳ in those places, 0 elsewhere", _slice),
    rule(
        "pad", "y = x with v around it and between its elements;  x̄ = ȳ where x is, 0 where x was "
        "cropped;  v̄ = Σ ȳ where v is",
        x=_pad_operand, v=_pad_value,
    ),
    pair("concatenate", "y = [a, b, ...];  each gets its part of ȳ", _concatenate),
    linear(
        "split", "y₁, y₂, ... = parts of x;  x̄ = [ȳ₁, ȳ₂, ...]",
        lambda dys, *, axis: lax.concatenate(dys, axis),
    ),
    pair(
        "stack", "y = a, b, ... along a new dimension;  each gets its part of ȳ",
        lambda site, _, dy: lax.unstack(dy, site.params["axis"]),
    ),
    linear(
        "unstack", "y₁, y₂, ... = parts of x;  x̄ = ȳ₁, ȳ₂, ... along the dimension",
        lambda dys, *, axis: lax.stack(dys, axis),
    ),
    linear("name", "y = x, under a name for checkpointing;  x̄ = ȳ", lambda dy: dy),
    rule("tie", "y = x, not before t exists;  x̄ = ȳ", t=None, x=lambda dy: dy),
    rule(
        "either", "y = x, or the same computed again (`fbprop.core.opaque`);  x̄ = ȳ",
        x=lambda dy: dy, again=None, on_gpu=None,
    ),
    rule(
        "made_of", "y = x, which may be made again so (`fbprop.core.opaque`);  x̄ = ȳ",
        x=lambda dy: dy, again=None,
    ),
    rule(
        "hold", "y = x, not before t exists (`fbprop.core.opaque`);  x̄ = ȳ", x=lambda dy: dy, t=None
    ),
    TAP,
    pair(
        "optimization_barrier", "y = x, nothing moved across;  x̄ = ȳ, behind a barrier of its own",
        _optimization_barrier,
    ),
    pair("device_put", "y = x, elsewhere;  x̄ = ȳ, back where x was", _device_put),
    _likewise("sharding_constraint", "y = x, laid out so;  x̄ = ȳ, laid out so"),
    _likewise("layout_constraint", "y = x, in this layout;  x̄ = ȳ, in this layout"),
    _likewise(
        "reduce_precision", "y = x rounded to fewer bits;  x̄ = ȳ rounded likewise: the rounding "
        "counts as the identity, as in JAX"
    ),
    *no_gradient("The bits of a number read as another type: no gradient.", "bitcast_convert_type"),
]
