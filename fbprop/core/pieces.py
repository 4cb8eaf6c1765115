"""A function's forward sweep in one or more pieces, and the backward sweep over them.

Python may ask for a value while a function is recorded (`fbprop.core.record`). What was recorded up
to then is a piece: it is planned and swept forward at once. Its results are the values that someone
still holds, so that everything else is freed, or kept, as in one piece.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.engine import Flow, Kept, Plan
from fbprop.core.recompute import Before
from fbprop.core.unknown import ERRORS
from fbprop.core.written import as_written


class Piece(NamedTuple):
    """A planned jaxpr, and the variables it shares with the others: inputs, results they take."""

    plan: Plan
    ins: tuple
    outs: tuple


class Pieces:
    """What was swept forward so far.

    Args:
      engine: the sweeps.
      form: in which form cotangents of the function's inputs may be unevaluated, or None.

    Attributes:
      active: variables that a differentiated input reaches.
    """

    def __init__(self, engine, form):
        self.engine, self.form, self.active = engine, form, set()
        self.inputs, self.swept, self.errors = set(), [], {}

    def start(self, var):
        """Add one of the function's inputs."""
        self.inputs.add(var)
        if jc.differentiable(var.aval):
            self.active.add(var)

    def run(self, jaxpr, args, written, wanted=None):
        """Sweep a piece forward; returns its results.

        Args:
          args: list of its arguments; emptied, so that they are freed once they are used.
          written: see `as_written`.
          wanted: of the last piece, per result whether its cotangent can be other than zero.
        """
        body = jc.open_jaxpr(jaxpr)
        plan = self._plan(as_written(jaxpr, written, "custom_vjp_call"), written, wanted)
        values, kept = self.engine.forward(plan, _handed_over(args))
        outs = tuple(body.outvars) if wanted is None else ()
        self.active.update(v for v, a in zip(outs, plan.active_out) if a)
        self.swept.append((Piece(plan, tuple(body.invars), outs), kept))
        return values

    def _plan(self, jaxpr, written, wanted):
        try:
            return self._plan_traced(jaxpr, wanted)
        except ERRORS:  # a derivative looks at values
            return self._plan_traced(as_written(jaxpr, written, "custom_jvp_call"), wanted)

    def _plan_traced(self, jaxpr, wanted):
        """The plan; of a piece that is not the last, for what can have a derivative."""
        ins = jc.open_jaxpr(jaxpr).invars
        active = tuple(v in self.active for v in ins)
        flow = Flow(self.engine, jc.runnable(jaxpr), active, "")
        forms = tuple(self.form if v in self.inputs else None for v in ins)
        if wanted is None:
            wanted = flow.active_out
            try:
                return Plan(flow, wanted, forms, at_hand=True)
            except ERRORS:
                raise
            except Exception:  # of results that the function's may not depend on
                wanted = tuple(w and self._has_derivative(flow, i) for i, w in enumerate(wanted))
        return Plan(flow, wanted, forms, at_hand=True)

    def _has_derivative(self, flow, i):
        outs = jc.open_jaxpr(flow.jaxpr).outvars
        try:
            Plan(flow, tuple(i == j for j in range(len(outs))), (), at_hand=True)
        except Exception as error:
            self.errors[outs[i]] = error.with_traceback(None)
        return outs[i] not in self.errors

    def finish(self):
        """The pieces that the results depend on, and what was kept of them as one `Kept`.

        Raises:
          What planning a piece raised, if a result depends on that after all.
        """
        found, reached = [], set()
        for piece, kept in reversed(self.swept):
            for v in reached.intersection(piece.outs, self.errors):
                raise self.errors[v]
            if not found or not reached.isdisjoint(piece.outs):
                found.insert(0, (piece, kept))
                reached.update(v for v, r in zip(piece.ins, piece.plan.reached) if r)
        values, extras, before = zip(*(kept for _, kept in found))
        before = Before(itertools.chain(*(b.items() for b in before)))
        return tuple(p for p, _ in found), Kept(sum(values, ()), sum(extras, ()), before)


def backward(engine, pieces, kept, douts):
    """Cotangents of the inputs of the last piece, which are the function's inputs and then others.

    Args:
      pieces, kept: see `Pieces.finish`; douts: cotangents of the last piece's results.
    """
    values, extras = map(iter, (kept.values, kept.extras))
    parts = [
        Kept(_next(values, len(p.plan.keep)), _next(extras, p.plan.n_extras), kept.before)
        for p in pieces
    ]
    acc = {}
    for piece, part in zip(reversed(pieces), reversed(parts)):
        if piece is not pieces[-1]:
            douts = [acc.pop(v, ct.ZERO) for v in piece.outs]
        for v, din in zip(piece.ins, engine.backward(piece.plan, part, douts)):
            total = ct.add(acc.get(v, ct.ZERO), din)
            acc[v] = total if total is din else ct.evaluated(total)
    return [acc.get(v, ct.ZERO) for v in pieces[-1].ins]


def _next(values, n):
    return tuple(itertools.islice(values, n))


def _handed_over(values):
    values.reverse()
    while values:
        yield values.pop()
