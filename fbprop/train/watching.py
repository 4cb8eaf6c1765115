"""A run's looks at what flows: every so many steps one more gradient, with its statistics."""

from __future__ import annotations

import jax
from jax.tree_util import tree_map

from fbprop import watch
from fbprop.train.gradients import in_equal_pieces
from fbprop.train.step import loss_at
from fbprop.watch.history import look, network


class Nobody:
    """Looks at nothing."""

    def rhythm(self, rhythm):
        return rhythm

    def after(self, dispatch, state, step: int) -> None:
        pass

    def take(self) -> dict:
        return {}


class Watching:
    """Looks at a step's gradient: of the last batch of a dispatch, at the parameters after it.

    Args:
      plan: `fbprop.watch.Every`.
      steps: how the run's steps are made, a `fbprop.train.culprit.Steps`.
    """

    def __init__(self, plan: watch.Every, steps):
        self.plan, self.pending, self.seen, self.described = plan, None, [], False
        self.place = steps.place
        self.pieces = steps.options.get("accumulate", 1)
        self.engine = {k: steps.options[k] for k in ("rules", "fallback") if k in steps.options}
        self.at = loss_at(
            steps.loss, steps.optimizer, steps.place, steps.options.get("compute_dtype")
        )
        self.report = jax.jit(self._report)

    def _report(self, state, batch, key):
        loss, params = self.at(state, key)
        options = {"where": self.plan.where, "of": self.plan.of, "has_aux": True}
        _, report = watch.value_and_grad(loss, **options, **self.engine)(params, batch)
        return self.place.result(state, report)[1]

    def rhythm(self, rhythm):
        """A feed's rhythm, with an end of a dispatch for every look."""
        return rhythm._replace(most=min(rhythm.most, self.plan.steps))

    def after(self, dispatch, state, step: int) -> None:
        """Looks, if a multiple of the plan's steps lies in a dispatch that ends with ``step``."""
        if (step - dispatch.steps) // self.plan.steps == step // self.plan.steps:
            return
        self._read()
        batch = dispatch.data
        if dispatch.indices is not None:
            batch = tree_map(lambda x: x[dispatch.indices[-1]], batch)
        if self.pieces > 1:  # the first piece: as much as there is memory for
            batch = tree_map(lambda x: x[0], in_equal_pieces(batch, self.pieces))
        key = jax.random.fold_in(state.key, state.step)
        self.pending = step, self.report(state, batch, key)

    def _read(self):
        if self.pending is None:
            return
        (step, report), self.pending = self.pending, None
        rate = self.plan.rate
        more = {} if rate is None else {"rate": float(rate(step) if callable(rate) else rate)}
        self.seen.append(look(step, report, **more))
        self.last = report

    def take(self) -> dict:
        """What a row of the log says of the looks since the one before."""
        self._read()
        if not self.seen:
            return {}
        found = {"seen": self.seen}
        if not self.described:
            found["network"] = network(self.last, self.engine.get("rules"))
            self.described = True
        self.seen = []
        return {"watch": found}


def watching(plan, steps) -> Watching | Nobody:
    """What looks, by `fbprop.train.fit`'s argument: None, a number of steps or a plan."""
    if plan is None:
        return Nobody()
    if not isinstance(plan, watch.Every):
        if not isinstance(plan, int) or isinstance(plan, bool):
            raise TypeError(
                f"watch says how often to look at what flows, got {plan!r} expected a number of "
                "steps, or fbprop.watch.every(100, where=...)."
            )
        plan = watch.every(plan)
    return Watching(plan, steps)
