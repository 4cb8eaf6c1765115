"""An inner jaxpr differentiated once, as two bodies: what `jit`, `cond`, `scan`, ... build on.

The forward body returns the results and a flat list of kept leaves. Each leaf is traced back to
where it comes from, so that a value that already exists outside (an operand, a result) is not
returned, and so not stored, a second time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.tree_util import tree_flatten, tree_unflatten

from fbprop.core import jaxcompat as jc


class Source(NamedTuple):
    """Source of a kept leaf: operand ``("in", i)``, result ``("out", i)`` or ``("new", i)``."""

    kind: str
    index: int


class Halves:
    """The forward and backward body of an inner jaxpr.

    Args:
      engine: the sweeps.
      jaxpr: closed inner jaxpr; active: per input; wanted: per output; path: enclosing scopes;
        factored: per input, in which form its cotangent may be unevaluated, or None.
    """

    def __init__(self, engine, jaxpr, active, wanted, path="", factored=()):
        self.engine = engine
        self.plan = engine.plan(inlined(jaxpr, engine.table), active, wanted, path, factored)
        self.n_out = len(wanted)

        def forward(*args):
            outs, kept = engine.forward(self.plan, args)
            leaves, self.tree = tree_flatten(kept)
            return [*outs, *leaves]

        self.body = jax.make_jaxpr(forward)(*jc.in_avals(jaxpr))
        body = jc.open_jaxpr(self.body)
        self.outs, leaves = body.outvars[: self.n_out], body.outvars[self.n_out :]
        known = {}
        for kind, atoms in (("out", self.outs), ("in", body.invars)):
            known.update((v, Source(kind, i)) for i, v in enumerate(atoms) if jc.is_var(v))
        self.new, self.sources = [], []
        self.stored = leaves
        for v in leaves:
            if not jc.is_var(v) or v not in known:
                source = Source("new", len(self.new))
                self.new.append(v)
                if jc.is_var(v):
                    known[v] = source
                self.sources.append(source)
            else:
                self.sources.append(known[v])

    @property
    def reached(self):
        return self.plan.reached

    @property
    def kept(self):
        """Types of the kept values, as the engine's `Kept`."""
        leaves = jc.open_jaxpr(self.body).outvars[self.n_out :]
        return tree_unflatten(self.tree, [v.aval for v in leaves])

    def borrowed(self) -> tuple[int, ...]:
        """Indices into (*operands, *results) of the leaves that exist outside already."""
        n = len(jc.open_jaxpr(self.body).invars)
        return tuple(
            sorted({s.index + n * (s.kind == "out") for s in self.sources if s.kind != "new"})
        )

    def leaves(self, borrowed_values, new):
        """The kept leaves again, from the values at `borrowed` and the new ones."""
        n = len(jc.open_jaxpr(self.body).invars)
        at = dict(zip(self.borrowed(), borrowed_values))
        return [
            new[s.index] if s.kind == "new" else at[s.index + n * (s.kind == "out")]
            for s in self.sources
        ]

    def forward(self, *args):
        """(results, new leaves)."""
        values = evaluate(self.body, args, [*self.outs, *self.new])
        return values[: self.n_out], values[self.n_out :]

    def backward(self, leaves, douts):
        """Cotangents of the inputs, from kept leaves and cotangents of the results."""
        return self.engine.backward(self.plan, tree_unflatten(self.tree, leaves), douts)


def halves(engine, jaxpr, active, wanted, path="", factored=()) -> Halves:
    """`Halves`, remembered: the same inner jaxpr is differentiated, and compiled, once."""
    return _halves(
        engine, jaxpr, tuple(active), tuple(wanted), engine.shared_path(path), tuple(factored)
    )


@functools.lru_cache(1024)
def _halves(*key):
    return Halves(*key)


def evaluate(jaxpr, args, want, known=None, bind=jc.bind):
    """Values of the atoms ``want`` of a jaxpr; runs only the equations they need, and effects.

    Args:
      known: values, by variable, that need not be computed again; effects then happened already.
      bind: ``(equation, operands) -> results``: how an equation is run.
    """
    body = jc.open_jaxpr(jaxpr)
    env = dict(zip(body.constvars, jc.consts_of(jaxpr)))
    env.update(zip(body.invars, args))
    env.update(known or {})
    for eqn in needed_equations(jaxpr, want, env, effects=known is None):
        operands = [env[v] if jc.is_var(v) else v.val for v in eqn.invars]
        env.update(zip(eqn.outvars, bind(eqn, operands)))
    return [env[v] if jc.is_var(v) else jc.literal(v) for v in want]


def needed_equations(jaxpr, want, known, effects=False) -> list:
    """The equations, in order, that the atoms ``want`` need, but for what is known already.

    Args:
      effects: those with effects too.
    """
    needed, run = {v for v in want if jc.is_var(v)}, []
    for eqn in reversed(jc.open_jaxpr(jaxpr).eqns):
        missing = any(v in needed and v not in known for v in eqn.outvars)
        if missing or (effects and eqn.effects):
            run.append(eqn)
            needed.update(v for v in eqn.invars if jc.is_var(v))
    return run[::-1]


def depends_on(jaxpr, inputs) -> set:
    """Variables of a jaxpr that depend on any of these input variables, or on effects."""
    found = set(inputs)
    for eqn in jc.open_jaxpr(jaxpr).eqns:
        if eqn.effects or any(jc.is_var(v) and v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def weights_in_sight(jaxpr, table):
    """The jaxpr with operations of ours that multiply by weights as plain code, if there are any.

    Not of loops and branches: there they stay.
    """
    def within(jaxpr):
        eqns = jc.open_jaxpr(jaxpr).eqns
        return any(_weighs(eqn, table) or (eqn.primitive.name == "jit" and
                   within(eqn.params["jaxpr"])) for eqn in eqns)

    return inlined(inlined(jaxpr, table, weights=True), table) if within(jaxpr) else jaxpr


def inlined(jaxpr, table=None, weights=False):
    """The jaxpr with nested `jit` calls written out, but for library functions that have a rule.

    Without a table, those too. With ``weights`` operations that multiply by such as plain code.

    Inside a loop or a branch everything is compiled as one anyway, and values inside the calls
    become visible: what a call computes from loop constants alone is then not kept per step.
    """
    outlined = table.outlined if table else lambda jaxpr: jaxpr
    jaxpr = outlined(jaxpr)
    written = lambda eqn: weights and _weighs(eqn, table)
    if not any(_inlines(eqn, table) or written(eqn) for eqn in jc.open_jaxpr(jaxpr).eqns):
        return jaxpr

    def run(jaxpr, args):
        body = jc.open_jaxpr(outlined(jaxpr))
        env = dict(zip((*body.constvars, *body.invars), (*jc.consts_of(jaxpr), *args)))
        used = {v for e in body.eqns for v in e.invars if jc.is_var(v)} | set(
            filter(jc.is_var, body.outvars))
        for eqn in body.eqns:
            operands = [env[v] if jc.is_var(v) else v.val for v in eqn.invars]
            if _inlines(eqn, table):
                with jc.equation_context(eqn):
                    outs = run(eqn.params["jaxpr"], operands)
            elif written(eqn):
                with jc.equation_context(eqn):
                    rule = table[eqn.primitive.name]
                    extras = not used.isdisjoint(eqn.outvars[rule.results:])
                    outs = rule.in_plain_code(*operands, extras=extras, **eqn.params)
            else:
                outs = jc.bind(eqn, operands)
            env.update(zip(eqn.outvars, outs))
        return [env[v] if jc.is_var(v) else jc.literal(v) for v in body.outvars]

    return jax.make_jaxpr(lambda *args: run(jaxpr, args))(*jc.in_avals(jaxpr))


def _inlines(eqn, table):
    if eqn.primitive.name != "jit" or jc.is_sharded(eqn):
        return False
    return table is None or table.function(eqn)[0] is None


def _weighs(eqn, table):
    return getattr(table.get(eqn.primitive.name), "weighs", False)
