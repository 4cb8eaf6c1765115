"""The rule for ``remat`` (`jax.checkpoint`): what its policy says is kept, the rest computed again.

A policy is asked about every equation of the forward pass, inside loops and branches as well. What
it saves of a loop's step is stacked, of a branch shares slots with the other branches', and what
it offloads waits in the other memory until the backward pass brings it back.
"""

from __future__ import annotations

import jax
from jax import lax

from fbprop.core import jaxcompat as jc
from fbprop.core.halves import evaluate, halves, inlined, needed_equations
from fbprop.core.rule import Step
from fbprop.rules.control import Call, aval_of, choose, shared_slots
from fbprop.rules.tie import Tie


class Remat(Call):
    """Keep what the policy names and the operands; compute the rest again going backward."""

    def __init__(self):
        super().__init__("remat2", "y = f(x);  f(x) again, then x̄ = fᵀ(ȳ)")

    def keeps(self):
        return "the operands that f(x) is computed from again, and what its policy saves"

    def halves(self, site):
        engine = site.engine._replace(frugal=True, looped=False)
        return halves(
            engine, self.inner(site), site.active, site.wanted, site.path, site.factored
        )

    def prepare(self, site):
        both = self.halves(site)
        flat = inlined(both.body)
        pairs = zip(jc.open_jaxpr(both.body).outvars, jc.open_jaxpr(flat).outvars)
        same = {v: w for v, w in pairs if jc.is_var(v)}
        atom = lambda v: same[v] if jc.is_var(v) else v  # a literal is itself
        outs, n = [*map(atom, both.outs)], len(site.in_avals)
        # Results that the backward pass asks for are computed again like everything else.
        results = [i for i in both.borrowed() if i >= n]
        want = [*map(atom, both.new), *(outs[i - n] for i in results)]
        saving = Saving(flat, site.params["policy"], want)
        keep = saving.inputs([i for i in both.borrowed() if i < n])
        tied = _prevented(site.params["prevent_cse"], n)
        tie = Tie(flat, saving.computed_again(), tied, hold=not site.engine.looped)

        def forward(*operands):
            return saving.first(operands, outs)

        def backward(kept, saved, douts):
            at = dict(zip(keep, kept))
            again, saved, douts = tie([at.get(i) for i in range(n)], saved, douts)
            values = saving.again(again, saved if saving else ((), []))
            new, made = values[: len(both.new)], values[len(both.new) :]
            at = dict(zip((*range(n), *results), (*again, *made)))
            return both.backward(both.leaves([at[i] for i in both.borrowed()], new), douts)

        # With nothing to save it runs as it stands: a derivative of this one meets it as `remat`.
        return Step(keep, backward, forward if saving else None, inner=(both,))


def _prevented(param, n):
    """Per operand, whether what is computed of it must not be found to be computed already."""
    return param if isinstance(param, tuple) else (param,) * n  # a tuple: jax 0.12


class Saving:
    """What a policy saves of a jaxpr, to compute the atoms ``want`` from again; the two runs.

    Nothing is saved that the second run does not need: a policy of everything saves what the
    backward pass uses and what leads there from nowhere else.
    """

    def __init__(self, jaxpr, policy, want):
        self.jaxpr, self.want, self.saved, self.nested = jaxpr, want, {}, {}
        eqns = jc.open_jaxpr(jaxpr).eqns if policy else ()
        made_by = {v: eqn for eqn in eqns for v in eqn.outvars}
        spaces, self.same = _decisions(policy, eqns)
        todo, seen = [*want], {}  # a dict: the order is the same in every process
        while todo:
            v = todo.pop()
            v = self.same.get(v, v) if jc.is_var(v) else v
            if not jc.is_var(v) or v in seen or v not in made_by:
                continue
            seen[v] = None
            if v in spaces:
                self.saved[v] = spaces[v]
            else:
                todo += made_by[v].invars
        for eqn in dict.fromkeys(made_by[v] for v in seen if v not in self.saved):
            if nested := _nested(eqn, policy, [v in seen for v in eqn.outvars]):
                self.nested[eqn] = nested

    def __bool__(self):
        return bool(self.saved or self.nested)

    def computed_again(self):
        """The equations that `again` runs."""
        known = {*self.saved, *(name for name, v in self.same.items() if v in self.saved)}
        return needed_equations(self.jaxpr, self.want, known)

    def inputs(self, others):
        """Indices of the inputs that `again` needs, and of these others."""
        used = {v for eqn in self.computed_again() for v in eqn.invars if jc.is_var(v)}
        used |= {v for v in self.want if jc.is_var(v)}
        invars = jc.open_jaxpr(self.jaxpr).invars
        return tuple(i for i, v in enumerate(invars) if v in used or i in others)

    def first(self, args, outs):
        """Values of the atoms ``outs``, and what is saved: a pytree for `again`."""
        inner = {}

        def bind(eqn, operands):
            if eqn not in self.nested:
                return jc.bind(eqn, operands)
            results, inner[eqn] = self.nested[eqn].first(operands)
            return results

        # The results of nested equations: to have them run even where no result needs them.
        nested = [eqn.outvars[0] for eqn in self.nested]
        values = evaluate(self.jaxpr, args, [*outs, *self.saved, *nested], bind=bind)
        saved = [_put(x, there) for x, (_, there) in zip(values[len(outs):], self.saved.values())]
        return values[: len(outs)], (saved, [inner[eqn] for eqn in self.nested])

    def again(self, args, saved):
        """Values of ``want``, of which nothing that was saved is computed."""
        values, inner = saved
        spaces = self.saved.values()
        known = {v: _put(x, here) for v, x, (here, _) in zip(self.saved, values, spaces)}
        known |= {name: known[v] for name, v in self.same.items() if v in known}
        inner = dict(zip(self.nested, inner))

        def bind(eqn, operands):
            if eqn not in self.nested:
                return jc.bind(eqn, operands)
            return self.nested[eqn].again(operands, inner[eqn])

        return evaluate(self.jaxpr, args, self.want, known, bind)


def _decisions(policy, eqns):
    """Where saved values are used and where they wait, by variable; named ones by plain ones."""
    spaces, same = {}, {}
    for eqn in eqns:
        # A bool, or one of three objects: to save, to recompute, to offload from src to dst.
        decision = policy(eqn.primitive, *[v.aval for v in eqn.invars], **eqn.params)
        if not decision or type(decision).__name__ == "RecomputeType":
            continue
        here, there = (getattr(decision, end, None) for end in ("src", "dst"))
        saved = eqn.outvars
        if eqn.primitive.name == "name" and jc.is_var(eqn.invars[0]):
            same[saved[0]] = same.get(eqn.invars[0], eqn.invars[0])
            saved = [same[saved[0]]]
        spaces.update((v, (_space(here), _space(there))) for v in saved)
    return spaces, same


class SavingScan:
    """`Saving` of a scan's body, its values stacked over the steps."""

    def __init__(self, eqn, policy, needed):
        self.n_consts, self.n_carry = jc.scan_sizes(eqn.params)
        self.outs = jc.open_jaxpr(eqn.params["jaxpr"]).outvars
        self.needed = [i < self.n_carry or n for i, n in enumerate(needed)]
        want = [v for v, n in zip(self.outs, self.needed) if n]
        self.body = Saving(eqn.params["jaxpr"], policy, want)
        self.options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}

    def __bool__(self):
        return bool(self.body)

    def first(self, operands):
        return self._run(operands, None, lambda args, _: self.body.first(args, self.outs))

    def again(self, operands, saved):
        outs, _ = self._run(operands, saved, lambda *step: (self.body.again(*step), None))
        outs = iter(outs)
        return [next(outs) if n else None for n in self.needed]

    def _run(self, operands, saved, step):
        a, b = self.n_consts, self.n_consts + self.n_carry
        consts, init, xs = operands[:a], operands[a:b], operands[b:]

        def body(carry, at):
            xs, saved = at
            outs, saved = step((*consts, *carry, *xs), saved)
            return outs[: self.n_carry], (outs[self.n_carry :], saved)

        carry, (ys, saved) = lax.scan(body, list(init), (list(xs), saved), **self.options)
        return [*carry, *ys], saved


class SavingCond:
    """`Saving` of the branches of a cond, in slots that they share."""

    def __init__(self, eqn, policy, _):
        self.params = eqn.params
        self.branches = [
            Saving(branch, policy, jc.open_jaxpr(branch).outvars)
            for branch in eqn.params["branches"]
        ]
        saved = [_types_of_saved(branch, eqn.invars[1:]) for branch in self.branches]
        self.slots, self.layouts = shared_slots([types for types, _ in saved])
        self.trees = [tree for _, tree in saved]

    def __bool__(self):
        return bool(self.slots)

    def first(self, operands):
        def run(branch, layout):
            def first(*args):
                outs, saved = branch.first(args, branch.want)
                filled = [*map(jc.zeros, self.slots)]
                for slot, value in zip(layout, jax.tree.leaves(saved)):
                    filled[slot] = value
                return outs, filled

            return first

        index, *args = operands
        return choose(self.params, index, [*map(run, self.branches, self.layouts)], *args)

    def again(self, operands, filled):
        def run(branch, layout, tree):
            def again(filled, *args):
                return branch.again(args, tree.unflatten([filled[slot] for slot in layout]))

            return again

        index, *args = operands
        runs = [*map(run, self.branches, self.layouts, self.trees)]
        return choose(self.params, index, runs, filled, *args)


def _types_of_saved(branch, operands):
    """Types and structure of what a branch saves."""
    traced, shapes = jax.make_jaxpr(
        lambda *args: branch.first(args, branch.want)[1], return_shape=True
    )(*(v.aval for v in operands))
    return [*map(aval_of, jc.open_jaxpr(traced).outvars)], jax.tree.structure(shapes)


def _nested(eqn, policy, needed):
    """The `Saving` of what is inside an equation; None if nothing inside is saved."""
    kind = {"scan": SavingScan, "cond": SavingCond}.get(eqn.primitive.name)
    return (kind(eqn, policy, needed) or None) if kind else None


def _space(kind):
    if kind is None:
        return None
    return jax.memory.Space.Device if kind == "device" else jax.memory.Space.Host


def _put(x, space):
    return x if space is None else jax.device_put(x, space)


RULES = [Remat()]
