"""The two sweeps over a jaxpr: what depends on what, forward with keeping, backward.

`Plan` decides statically, before anything runs: which equations are differentiated, by which rule,
and which values are kept. `Engine.forward` evaluates and keeps; `Engine.backward` pops each
equation's cotangents, applies its rule and adds into the operands'. Whatever is about one
primitive stands in its rule.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.factored import Factored
from fbprop.core.fallback import fallback_rule
from fbprop.core.gpu_plan import Kept as KeptOnGpu
from fbprop.core.gpu_plan import by_cut
from fbprop.core.recompute import Before, Values, split
from fbprop.core.rule import Site, Step
from fbprop.core.table import MissingRule, Table


class Flow:
    """Which equations of a jaxpr depend on its active inputs, and which outputs do."""

    def __init__(self, engine: Engine, jaxpr, active: tuple[bool, ...], path: str):
        self.jaxpr = engine.table.outlined(jaxpr)
        body = jc.open_jaxpr(self.jaxpr)
        self.live = {v for v, a in zip(body.invars, active) if a and jc.differentiable(v.aval)}
        # What is written to a mutable reference is read from it, in a loop from the start.
        self.live |= set(jc.written(body.invars, body.effects) if any(active) else ())
        self.sites: list[tuple[Site, object] | None] = []
        for eqn in body.eqns:
            operands = tuple(jc.is_var(v) and v in self.live for v in eqn.invars)
            self.sites.append(engine.site(eqn, operands, path) if any(operands) else None)
            if self.sites[-1]:
                site, rule = self.sites[-1]
                out = rule.active_out(site) if rule else map(jc.differentiable, site.out_avals)
                self.live.update(v for v, a in zip(eqn.outvars, out) if a)
                self.live.update(jc.written(eqn.invars, eqn.effects))
        self.active_out = tuple(jc.is_var(v) and v in self.live for v in body.outvars)

    def reach(self, wanted: tuple[bool, ...]) -> set:
        """Variables whose cotangent can be other than zero; sets ``wanted`` on every site."""
        body = jc.open_jaxpr(self.jaxpr)
        reached = {v for v, w in zip(body.outvars, wanted) if w and jc.is_var(v) and v in self.live}
        for eqn, found in zip(reversed(body.eqns), reversed(self.sites)):
            if not found:
                continue
            site, rule = found
            site.wanted = tuple(v in reached for v in eqn.outvars)
            if any(site.wanted):
                if rule is None:
                    raise MissingRule(site)
                site.reached = rule.reached(site)
                # A literal can be reached (a carry that starts at 0.0) but has no cotangent.
                reached.update(
                    v for v, r in zip(eqn.invars, site.reached) if r and jc.is_var(v)
                )
        return reached


class Plan:
    """Everything decided about a jaxpr before it runs; static, so it can sit in a pytree's type.

    Attributes:
      steps: per equation, None (only evaluate it) or (site, rule, step).
      keep: the variables kept, each once however many rules ask for it; made: equations by which
        the others that rules ask for are made again from these (`fbprop.core.recompute`).
      on_gpu: the same in programs for one NVIDIA GPU (`fbprop.core.gpu_plan`); at_hand: variables
        whose values the backward sweep may use, in the same trace.
      reached: per input, whether it can get a cotangent.
      factored: the variables whose cotangents may stay unevaluated, and in which form (a subclass
        of `Factored`): the inputs for which the caller said so, and the results of equations whose
        rules take them.
      n_extras: the number of steps that have a forward of their own.
    """

    def __init__(
        self, flow: Flow, wanted: tuple[bool, ...], factored: tuple, at_hand: bool, again=True
    ):
        self.jaxpr, self.wanted = flow.jaxpr, wanted
        body = jc.open_jaxpr(flow.jaxpr)
        reached = flow.reach(wanted)
        self.reached = tuple(v in reached for v in body.invars)
        self.active_out = flow.active_out
        self.steps: list[tuple[Site, object, Step] | None] = []
        self.factored = {v: f for v, f in zip(body.invars, factored) if f}
        keep, hand = {}, set()
        for eqn, found in zip(body.eqns, flow.sites):
            if not found or not any(found[0].wanted):
                self.steps.append(None)
                continue
            site, rule = found
            if rule.takes_factored:
                form = Factored if rule.takes_factored is True else rule.takes_factored
                self.factored.update(dict.fromkeys(eqn.outvars, form))
            site.factored = tuple(jc.is_var(v) and self.factored.get(v) for v in eqn.invars)
            step = rule.prepare(site)
            atoms = (*eqn.invars, *eqn.outvars)
            keep.update((atoms[i], None) for i in step.keep if jc.is_var(atoms[i]))
            hand.update(atoms[i] for i in step.at_hand if jc.is_var(atoms[i]))
            self.steps.append((site, rule, step))
        inputs = (*body.invars, *body.constvars) if at_hand else ()
        stored = split(body, self.steps, keep, inputs) if again else (tuple(keep), {})
        self.keep, self.made = stored
        together = again and at_hand
        self.on_gpu = by_cut(body, self.steps, keep, inputs) if together else KeptOnGpu(*stored)
        self.at_hand = {*self.made, *self.on_gpu.stored, *self.on_gpu.made, *hand}
        self.n_extras = sum(1 for found in self.steps if found and found[2].forward)


class Kept(NamedTuple):
    """What the forward sweep leaves for the backward sweep: a pytree of arrays."""

    values: tuple  # of Plan.keep
    extras: tuple  # of the steps that have a forward of their own, in order
    before: Before = Before()  # traced values of Plan.at_hand, while they are


class Engine(NamedTuple):
    """A table and a fallback, and the sweeps under them.

    Attributes:
      frugal: inside `jax.checkpoint`: nothing is held back to be computed in one go later.
      looped: inside a loop, whose two sweeps are two loops: XLA does not merge what is in them.
      linear: what is differentiated is a linear function, of tangents (`Rule.on_tangents`).
    """

    table: Table
    fallback: str | None = "registered"
    frugal: bool = False
    looped: bool = False
    linear: bool = False

    def site(self, eqn, active, path):
        scope = "/".join(p for p in (path, jc.scope(eqn)) if p)
        rule, arguments = self.table.find(eqn, scope)
        site = Site(eqn, scope, active, self)
        if arguments is not None:
            site.params = arguments
        if rule is None:
            rule = fallback_rule(eqn.primitive, self.fallback)
        return site, rule.on_tangents() if rule and self.linear else rule

    def shared_path(self, path):
        """The path as a part of cache keys: it matters only to tables with scoped overrides."""
        return path if self.table.is_scoped else ""

    def flow(self, jaxpr, active, path="") -> Flow:
        return _flow(self, jaxpr, tuple(active), self.shared_path(path))

    def plan(self, jaxpr, active, wanted, path="", factored=()) -> Plan:
        """The plan of an inner jaxpr, remembered: a loop body is differentiated once."""
        shared = self.shared_path(path)
        try:
            return _plan(self, jaxpr, tuple(active), tuple(wanted), shared, tuple(factored))
        except MissingRule:  # again, for the full path in the message
            return Plan(Flow(self, jaxpr, active, path), wanted, (), at_hand=True)

    def forward(self, plan: Plan, args) -> tuple[list, Kept]:
        """Evaluate the jaxpr; returns its results and what the backward sweep needs."""
        body = jc.open_jaxpr(plan.jaxpr)
        env = dict(zip(body.constvars, jc.consts_of(plan.jaxpr)))
        env.update(zip(body.invars, args))
        keep, extras, last = set(plan.keep), [], _last_uses(plan)
        before = Before()
        before.add(plan.at_hand, env, env.values())
        for i, (eqn, found) in enumerate(zip(body.eqns, plan.steps)):
            if found and found[2].forward:
                operands = [env[v] if jc.is_var(v) else jc.literal(v) for v in eqn.invars]
                with jc.equation_context(eqn):
                    outs, extra = found[2].forward(*operands)
                extras.append(extra)
            else:
                outs = jc.bind(eqn, [env[v] if jc.is_var(v) else v.val for v in eqn.invars])
            env.update(zip(eqn.outvars, outs))
            before.add(plan.at_hand, eqn.outvars, outs)
            for v in last.get(i, ()):
                if v not in keep:
                    env.pop(v, None)
        outs = [env[v] if jc.is_var(v) else jc.literal(v) for v in body.outvars]
        return outs, Kept(tuple(env[v] for v in plan.keep), tuple(extras), before)

    def backward(self, plan: Plan, kept: Kept, cotangents) -> list:
        """Cotangents of the jaxpr's inputs, `ct.ZERO` where nothing flows.

        They are arrays, or `Factored` where the plan says that these are welcome.
        """
        body = jc.open_jaxpr(plan.jaxpr)
        values = Values(plan.keep, plan.made, plan.on_gpu, kept.values, kept.before)
        extras = list(kept.extras)
        acc: dict = {}
        for v, dout, w in zip(body.outvars, cotangents, plan.wanted):
            if w and jc.is_var(v):
                acc[v] = ct.add(acc.get(v, ct.ZERO), dout)
        for eqn, found in zip(reversed(body.eqns), reversed(plan.steps)):
            if not found:
                continue
            site, rule, step = found
            extra = extras.pop() if step.forward else None
            douts = [acc.pop(v, ct.ZERO) for v in eqn.outvars]
            if all(map(ct.is_zero, douts)):
                continue
            atoms = (*eqn.invars, *eqn.outvars)
            wants = [values.wanted(atoms[i], douts) for i in step.keep]
            wants += [values.before.get(atoms[i]) for i in step.at_hand]
            values.forget(eqn)
            with jc.backward_context(eqn):
                for v, din in zip(eqn.invars, _pull(site, rule, step, wants, extra, douts)):
                    if jc.is_var(v) and not ct.is_zero(din):
                        with jc.mesh_context(v.aval):
                            # Added before it is evaluated: rows go into what is there already.
                            total = ct.add(acc.get(v, ct.ZERO), din)
                            stays = isinstance(total, plan.factored.get(v, ()))
                            acc[v] = total if stays else ct.evaluated(total)
        return [acc.get(v, ct.ZERO) for v in body.invars]


def _pull(site, rule, step, kept, extra, douts):
    """One rule across the boundary: zeros filled in before, every cotangent checked after."""
    if not rule.takes_zeros:
        douts = [
            ct.filled(d, a) if jc.differentiable(a) else d for d, a in zip(douts, site.out_avals)
        ]
    dins = list(step.backward(kept, extra, douts))
    ct.check_count(rule, dins, len(site.in_avals))
    return [
        ct.fit(d, aval, site, rule, i) if r else ct.ZERO
        for i, (d, aval, r) in enumerate(zip(dins, site.in_avals, site.reached))
    ]


def _last_uses(plan):
    """Index of an equation -> variables that are dead after it, so that eager memory is freed."""
    if not hasattr(plan, "last_uses"):
        body = jc.open_jaxpr(plan.jaxpr)
        last = {}
        for i, eqn in enumerate(body.eqns):
            last.update((v, i) for v in (*eqn.invars, *eqn.outvars) if jc.is_var(v))
        for v in body.outvars:
            if jc.is_var(v):
                last.pop(v, None)
        plan.last_uses = {}
        for v, i in last.items():
            plan.last_uses.setdefault(i, []).append(v)
    return plan.last_uses


# Inner jaxprs are objects that JAX itself reuses from call to call, so these are found again.
@functools.lru_cache(2048)
def _flow(engine, jaxpr, active, path):
    return Flow(engine, jaxpr, active, path)


@functools.lru_cache(2048)
def _plan(engine, jaxpr, active, wanted, path, factored):
    # Of what `jax.checkpoint` computes again some is made once more, held by a cotangent, which
    # stays for it. In float16, which CPUs convert, that is more than it saves: norm and GELU take
    # 1.19 of `jax.grad`'s memory with it, 1.00 without; in bfloat16 0.96 and 1.04.
    again = engine.looped or not engine.frugal or not _is_costly_to_hold(jaxpr)
    return Plan(Flow(engine, jaxpr, active, path), wanted, factored, at_hand=False, again=again)


def _is_costly_to_hold(jaxpr):
    types = {str(getattr(aval, "dtype", "")) for aval in jc.in_avals(jaxpr)}
    return not types.isdisjoint(jc.types_costly_to_hold())
