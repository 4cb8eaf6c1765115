"""The rule for ``scan``: the body is differentiated once, into a forward and a backward body.

What the rules in the body keep is sorted by where it comes from, so that no value is stored twice:
loop constants and whatever depends on them alone are kept once, not once per step; slices of the
scanned operands and of the scanned results are the operands and results themselves; only the rest
is stacked.
"""

from __future__ import annotations

import functools

import jax
from jax import lax

from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.factored import Factored
from fbprop.core.halves import Halves, depends_on, evaluate, inlined
from fbprop.core.rule import Rule, Step
from fbprop.rules.sweep import Sweep


class Scan(Rule):
    """(c, y) = body(k, c, x) repeated;  (c̄, x̄) = bodyᵀ(c̄, ȳ) repeated in reverse, k̄ summed."""

    takes_zeros = True
    sweep = Sweep  # how the backward run goes

    def __init__(self):
        super().__init__(
            "scan",
            "cₜ₊₁, yₜ = f(k, cₜ, xₜ);  dk, c̄ₜ, x̄ₜ = fᵀ(c̄ₜ₊₁, ȳₜ) from the last step to the first, "
            "k̄ = Σ dk",
        )

    def keeps(self):
        return "per step what the rules in the body keep; loop-invariant values once"

    def active_out(self, site):
        n_consts, n_carry = jc.scan_sizes(site.params)
        carry = _active_carry(site)
        active = (*site.active[:n_consts], *carry, *site.active[n_consts + n_carry :])
        out = site.engine.flow(site.params["jaxpr"], active, site.path).active_out
        return (*carry, *out[n_carry:])

    def reached(self, site):
        active, wanted = _fixpoint(site)
        return _reach(site, active, wanted)

    def prepare(self, site):
        loop = _loop(
            site.engine, site.params["jaxpr"], *_fixpoint(site), jc.scan_sizes(site.params),
            site.params["length"], site.params["reverse"], site.params["unroll"],
            site.engine.shared_path(site.path), self.sweep,
        )
        return Step(
            loop.keep, loop.backward, loop.forward, inner=(loop.both,), slots=tuple(loop.slots)
        )


def _active_carry(site):
    """Carried values that depend on a differentiated input at some step."""
    n_consts, n_carry = jc.scan_sizes(site.params)
    carry = site.active[n_consts : n_consts + n_carry]
    while True:
        active = (*site.active[:n_consts], *carry, *site.active[n_consts + n_carry :])
        out = site.engine.flow(site.params["jaxpr"], active, site.path).active_out
        grown = tuple(a or b for a, b in zip(carry, out))
        if grown == carry:
            return carry
        carry = grown


def _reach(site, active, wanted):
    flow = site.engine.flow(site.params["jaxpr"], active, site.path)
    reached = flow.reach(wanted)
    return tuple(v in reached for v in jc.open_jaxpr(site.params["jaxpr"]).invars)


def _fixpoint(site):
    """(active inputs, wanted outputs) of the body that hold at every step."""
    n_consts, n_carry = jc.scan_sizes(site.params)
    active = (*site.active[:n_consts], *_active_carry(site), *site.active[n_consts + n_carry :])
    wanted = site.wanted
    while True:
        reached = _reach(site, active, wanted)[n_consts : n_consts + n_carry]
        grown = (*(a or b for a, b in zip(wanted, reached)), *wanted[n_carry:])
        if grown == wanted:
            return active, wanted
        wanted = grown


@functools.lru_cache(2048)
def _contains_remat(jaxpr):
    eqns = jc.open_jaxpr(jaxpr).eqns
    inner = (jaxpr for eqn in eqns for _, jaxpr in jc.sub_jaxprs(eqn.params))
    return any(eqn.primitive.name == "remat2" for eqn in eqns) or any(map(_contains_remat, inner))


@functools.lru_cache(512)
def _loop(*key):
    return Loop(*key)


class Loop:
    """A differentiated scan: static, so that JAX compiles either direction once."""

    def __init__(self, engine, jaxpr, active, wanted, sizes, length, reverse, unroll, path, sweep):
        self.n_consts, self.n_carry = sizes
        self.sweep = sweep
        self.length, self.unroll, self.reverse = length, unroll, reverse
        n_xs = len(jc.in_avals(jaxpr)) - sum(sizes)
        factored = (Factored,) * self.n_consts + (None,) * self.n_carry + (Factored,) * n_xs
        # Where less memory was asked for, no factors are collected.
        self.frugal = engine.frugal or _contains_remat(jaxpr)
        engine = engine._replace(looped=True)
        self.both = both = Halves(
            engine, inlined(jaxpr, engine.table), active, wanted, path, factored
        )
        self.wanted_carry = wanted[: self.n_carry]
        self.in_avals = jc.in_avals(jaxpr)
        self.n_in = len(self.in_avals)
        invars = jc.open_jaxpr(both.body).invars
        varying = depends_on(both.body, invars[self.n_consts :])
        new = [jc.is_var(v) and v in varying for v in both.new]
        self.once = [v for v, stacked in zip(both.new, new) if not stacked]
        # A carried input or output that is kept is one of its step's values: it is stacked too.
        self.carried = [s for s in dict.fromkeys(both.sources) if self._is_carried(s)]
        self.stacked = [v for v, stacked in zip(both.new, new) if stacked]
        self.stacked += [
            (invars if s.kind == "in" else both.outs)[s.index] for s in self.carried
        ]
        self.slots = self._slots(new)
        self.keep = tuple(sorted({i for kind, i in self.slots if kind == "outer"}))
        self.reached = both.reached
        self._forward, self._backward = jax.jit(self._run_forward), jax.jit(self._run_backward)

    def _is_carried(self, s):
        if s.kind == "in":
            return self.n_consts <= s.index < self.n_consts + self.n_carry
        return s.kind == "out" and s.index < self.n_carry

    def _slots(self, new):
        """Per kept leaf: ("outer", index of operand or result), ("once", i) or ("stacked", i)."""
        once, stacked, place = 0, 0, []
        for is_stacked in new:
            place.append(("stacked", stacked) if is_stacked else ("once", once))
            once, stacked = once + (not is_stacked), stacked + is_stacked
        slots = []
        for s in self.both.sources:
            if s.kind == "new":
                slots.append(place[s.index])
            elif s in self.carried:
                slots.append(("stacked", stacked + self.carried.index(s)))
            else:
                slots.append(("outer", s.index + self.n_in * (s.kind == "out")))
        return slots

    def forward(self, *operands):
        return self._forward(*operands)

    def _run_forward(self, *operands):
        a, b = self.n_consts, self.n_consts + self.n_carry
        consts, init, xs = operands[:a], operands[a:b], operands[b:]
        once = evaluate(self.both.body, consts, self.once, known={})

        def body(carry, x):
            want = [*self.both.outs, *self.stacked]
            values = evaluate(self.both.body, (*consts, *carry, *x), want)
            outs, kept = values[: self.both.n_out], values[self.both.n_out :]
            return outs[: self.n_carry], (outs[self.n_carry :], kept)

        carry, (ys, stacked) = lax.scan(
            body, list(init), list(xs), length=self.length, reverse=self.reverse,
            unroll=self.unroll,
        )
        return [*carry, *ys], (once, stacked)

    def backward(self, kept, extra, douts):
        return self._backward(kept, extra, list(douts))

    def _run_backward(self, kept, extra, douts):
        a, b = self.n_consts, self.n_consts + self.n_carry
        outer = dict(zip(self.keep, kept))
        source = {"once": extra[0], "stacked": extra[1], "outer": outer}
        leaves = [source[kind][i] for kind, i in self.slots]
        stepping = [kind == "stacked" or (kind == "outer" and i >= a) for kind, i in self.slots]
        dcarry = [
            ct.dense(d, v) if w else ct.ZERO
            for d, v, w in zip(douts, self.in_avals[a:b], self.wanted_carry)
        ]
        sweep = self.sweep(self, leaves, stepping, dcarry, douts[self.n_carry :])
        dconsts, dcarry, dxs = sweep.run(dcarry)
        dcarry = [d if r else ct.ZERO for d, r in zip(dcarry, self.reached[a:b])]
        return [*dconsts, *dcarry, *dxs]


RULES = [Scan()]
