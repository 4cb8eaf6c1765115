"""The rule for ``shard_map``: the body's two halves run where the body runs, shard by shard."""

from __future__ import annotations

import math

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.rule import Step
from fbprop.rules.control import Call


class ShardMap(Call):
    """Kept values stay on the device that made them.

    Seen from outside, a kept shard is one row of an array whose new first dimension runs over the
    devices it differs on. Without ``check_vma`` JAX does not say on which it does: then over all.
    """

    def active_out(self, site):
        return _in_mesh(site, lambda: super(ShardMap, self).active_out(site))

    def reached(self, site):
        return _in_mesh(site, lambda: super(ShardMap, self).reached(site))

    def prepare(self, site):
        return _step(_in_mesh(site, lambda: self.halves(site)), site)


def _in_mesh(site, run):
    """Run something where the mesh's axes are bound, by tracing a ``shard_map`` that does it."""
    found = []

    def body(*args):
        found.append(run())
        return args

    specs = site.params["in_specs"]
    jax.eval_shape(mapped(site, body, specs, specs), *site.in_avals)
    return found[0]


def mapped(site, body, in_specs, out_specs):
    """A function run where the body of a ``shard_map`` runs (of a `Site`, or of an equation)."""
    params = site.params
    return jax.shard_map(
        body, mesh=params["mesh"], in_specs=tuple(in_specs), out_specs=out_specs,
        axis_names=set(params["newly_manual_axes"]), check_vma=params["check_vma"],
    )


def _step(both, site):
    params = site.params
    tracked, in_specs = params["check_vma"], list(params["in_specs"])
    out_specs = list(params["out_specs"])
    axes = tuple(a for a in params["mesh"].axis_names if a in params["newly_manual_axes"])
    rows = [
        tuple(a for a in axes if a in jc.varying_axes(v.aval)) if tracked else axes
        for v in both.new
    ]
    new_specs = [P(r) if r else P() for r in rows]  # P(()) is too long for a number
    borrowed = both.borrowed()
    kept_specs = [[*in_specs, *out_specs][i] for i in borrowed]
    din_specs = [s for s, r in zip(in_specs, both.reached) if r]

    def forward(*operands):
        def body(*operands):
            outs, new = both.forward(*operands)
            return outs, [k[None] if r else k for k, r in zip(new, rows)]

        return mapped(site, body, in_specs, (out_specs, new_specs))(*operands)

    def backward(kept, new, douts):
        def body(kept, new, douts):
            leaves = both.leaves(kept, [k[0] if r else k for k, r in zip(new, rows)])
            if not tracked:
                douts = [_share(d, params["mesh"], _missing(s, axes))
                         for d, s in zip(douts, out_specs)]
            dins = both.backward(leaves, douts)
            reached = zip(dins, jc.in_avals(both.body), both.reached)
            dins = [ct.dense(d, aval) for d, aval, r in reached if r]
            if not tracked:
                dins = [_collect(d, _missing(s, axes)) for d, s in zip(dins, din_specs)]
            return dins

        run = mapped(site, body, (kept_specs, new_specs, out_specs), din_specs)
        dins = iter(run(list(kept), list(new), list(douts)))
        return [next(dins) if r else None for r in both.reached]

    return Step(borrowed, backward, forward, (both,))


def _missing(spec, axes):
    """Axes over which a spec replicates."""
    named = {a for part in spec for a in (part if isinstance(part, tuple) else (part,))}
    return tuple(a for a in axes if a not in named)


# Without tracking, JAX's convention: a result that is the same on several devices brings each of
# them its share of the cotangent, and an operand collects from all devices that hold it.
def _share(d, mesh, axes):
    return d if ct.is_zero(d) else d / math.prod(mesh.shape[a] for a in axes)


def _collect(d, axes):
    return lax.psum(d, axes) if axes else d


RULES = [
    ShardMap("shard_map", "y = f(x) on every device's shard;  x̄ = fᵀ(ȳ) on every device's shard"),
]
