"""Rules for equations that contain other equations: jit, cond, while, custom derivatives.

Each asks the engine for the two halves of its inner jaxprs (`fbprop.core.halves`) and runs them the
way the equation itself runs. ``scan`` and ``remat`` have files of their own.
"""

from __future__ import annotations

import functools

import jax
from jax import lax

from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.fallback import jax_step
from fbprop.core.halves import evaluate, halves
from fbprop.core.library import jvp_jaxpr
from fbprop.core.rule import NoGradient, Rule, Step


class Call(Rule):
    """An equation that calls one inner jaxpr on its operands."""

    takes_zeros = True

    def inner(self, site):
        return next(jaxpr for _, jaxpr in jc.sub_jaxprs(site.params))

    def keeps(self):
        return "what the rules inside keep"

    def active_out(self, site):
        return site.engine.flow(self.inner(site), site.active, site.path).active_out

    def reached(self, site):
        flow = site.engine.flow(self.inner(site), site.active, site.path)
        reached = flow.reach(site.wanted)
        return tuple(v in reached for v in jc.open_jaxpr(self.inner(site)).invars)

    def halves(self, site):
        return halves(
            site.engine, self.inner(site), site.active, site.wanted, site.path, site.factored
        )

    def prepare(self, site):
        both = self.halves(site)
        return Step(
            both.borrowed(),
            lambda kept, new, douts: both.backward(both.leaves(kept, new), douts),
            both.forward,
            inner=(both,),
        )


class Jit(Call):
    """A compiled call stays one compiled call in either direction."""

    def prepare(self, site):
        jitted = _jitted(self.halves(site), *_prescribed(site.eqn))
        both, forward, backward = jitted
        return Step(
            both.borrowed(),
            lambda kept, new, douts: backward(both.leaves(kept, new), list(douts)),
            forward,
            inner=(both,),
        )


def _prescribed(eqn):
    return eqn.params["in_shardings"], eqn.params["out_shardings"]


@functools.lru_cache(1024)
def _jitted(both, in_shardings, out_shardings):
    def forward(*args):
        outs, new = both.forward(*jc.constrain(args, in_shardings))
        return jc.constrain(outs, out_shardings), new

    return both, jax.jit(forward), jax.jit(both.backward)


class Cond(Rule):
    """The branch taken forward is the branch taken backward; its kept leaves share storage.

    Branches keep different things. Each leaf gets a slot of its type, as few slots as the most
    demanding branch needs; the branches that do not use a slot fill it with zeros.
    """

    takes_zeros = True

    def __init__(self):
        super().__init__("cond", "y = branch_i(x);  x̄ = branch_iᵀ(ȳ)")

    def keeps(self):
        return "the branch index and what the rules in the branches keep"

    def _flows(self, site):
        return [site.engine.flow(b, site.active[1:], site.path) for b in site.params["branches"]]

    def active_out(self, site):
        return tuple(map(any, zip(*(flow.active_out for flow in self._flows(site)))))

    def reached(self, site):
        each = []
        for flow in self._flows(site):
            reached = flow.reach(site.wanted)
            each.append([v in reached for v in jc.open_jaxpr(flow.jaxpr).invars])
        return (False, *map(any, zip(*each)))

    def prepare(self, site):
        branches = [
            halves(site.engine, b, site.active[1:], site.wanted, site.path)
            for b in site.params["branches"]
        ]
        borrowed = sorted({i for b in branches for i in b.borrowed()})
        slots, layouts = shared_slots([[aval_of(v) for v in b.new] for b in branches])
        reached = site.reached[1:]
        avals = site.in_avals[1:]

        def forward(index, *operands):
            def run(both, layout):
                def branch(*operands):
                    outs, new = both.forward(*operands)
                    filled = [ct.dense(ct.ZERO, aval) for aval in slots]
                    for slot, value in zip(layout, new):
                        filled[slot] = value
                    return outs, filled

                return branch

            return choose(site.params, index, [*map(run, branches, layouts)], *operands)

        def backward(kept, filled, douts):
            index, *values = kept
            at = dict(zip(borrowed, values))

            def run(both, layout):
                def branch(at, filled, douts):
                    leaves = both.leaves(
                        [at[i] for i in both.borrowed()], [filled[slot] for slot in layout]
                    )
                    dins = both.backward(leaves, douts)
                    return [ct.dense(d, a) for d, a, r in zip(dins, avals, reached) if r]

                return branch

            runs = [*map(run, branches, layouts)]
            dins = iter(choose(site.params, index, runs, at, filled, list(douts)))
            return [None, *(next(dins) if r else None for r in reached)]

        return Step((0, *(i + 1 for i in borrowed)), backward, forward, tuple(branches))


def choose(params, index, branches, *args):
    """Run the branch of that index; by platform where the user branched on the platform."""
    platforms = params.get("branches_platforms")
    if platforms is None:
        return lax.switch(index, branches, *args)
    named = {name: f for names, f in zip(platforms, branches) for name in names or ("default",)}
    return lax.platform_dependent(*args, **named)


def aval_of(atom):
    return atom.aval.strip_weak_type()


def shared_slots(types_per_branch):
    """(types of the shared slots, per branch the slot of each of its leaves)."""
    slots, layouts = [], []
    for types in types_per_branch:
        free, layout = list(range(len(slots))), []
        for t in types:
            slot = next((i for i in free if slots[i] == t), None)
            if slot is None:
                slot = len(slots)
                slots.append(t)
            else:
                free.remove(slot)
            layout.append(slot)
        layouts.append(layout)
    return slots, layouts


class While(NoGradient):
    """The number of steps is known only when they have run: nothing can be kept for going back."""

    def __init__(self):
        super().__init__(
            "while",
            "No gradient passes: the number of steps is not static. Forward only is fine.",
        )

    def active_out(self, site):
        consts = site.params["cond_nconsts"]
        body = consts + site.params["body_nconsts"]
        carry = site.active[body:]
        while True:
            out = site.engine.flow(
                site.params["body_jaxpr"], (*site.active[consts:body], *carry), site.path
            ).active_out
            grown = tuple(a or b for a, b in zip(carry, out))
            if grown == carry:
                return carry
            carry = grown

    def prepare(self, site):
        def backward(kept, extra, douts):
            raise ValueError(
                "Reverse-mode differentiation does not work for lax.while_loop or lax.fori_loop "
                f"with dynamic start/stop values{site.location()}: use lax.scan, or lax.fori_loop "
                "with static start/stop."
            )

        return Step((), backward)  # the value can be had, and a pullback that is not called


class CustomJVP(Call):
    """The user's own derivative, transposed by this table's rules.

    The jaxpr of (operands, tangents) -> (results, tangents) is linear in the tangents, so its
    reverse sweep with respect to them, at any tangents, is the transpose.
    """

    def active_out(self, site):
        return Rule.active_out(self, site)

    def reached(self, site):
        return site.active

    def on_tangents(self):
        """What the function computes: of a linear function the derivative is the function.

        So a rule may call its own function on the tangents, and JAX does the same.
        """
        return ON_TANGENTS

    def halves(self, site):
        wanted = tuple(w for w, v in zip(site.wanted, site.out_avals) if jc.differentiable(v))
        return halves(
            site.engine._replace(linear=True),
            jvp_jaxpr(site.eqn, site.active),
            (False,) * len(site.in_avals) + (True,) * sum(site.active),
            (False,) * len(site.out_avals) + wanted,
            site.path,
        )

    def prepare(self, site):
        both = self.halves(site)
        n, n_out = len(site.in_avals), len(site.out_avals)
        tangents = jc.in_avals(both.body)[n:]
        results = [i for i, a in enumerate(site.out_avals) if jc.differentiable(a)]
        moving = [i for i, a in enumerate(site.active) if a]
        types = [*jc.in_avals(both.body), *jc.out_avals(both.body)]
        primal = [*range(n), *[None] * len(tangents), *range(n, n + n_out)]
        primal += [None] * (len(types) - len(primal))
        borrowed = [(primal[i], types[i]) for i in both.borrowed()]

        def forward(*operands):
            zeros = [ct.dense(ct.ZERO, a) for a in tangents]
            values = evaluate(both.body, (*operands, *zeros), [*both.outs[:n_out], *both.new])
            return values[:n_out], values[n_out:]

        def backward(kept, new, douts):
            # A tangent that some rule keeps without need is 0, as it was in the forward.
            kept = iter(kept)
            at = [ct.dense(ct.ZERO, a) if i is None else next(kept) for i, a in borrowed]
            dots = [douts[i] for i in results]
            dins = both.backward(both.leaves(at, new), [ct.ZERO] * n_out + dots)
            out = [None] * n
            for i, d in zip(moving, dins[n:]):
                out[i] = d
            return out

        keep = tuple(i for i, _ in borrowed if i is not None)
        return Step(keep, backward, forward, inner=(both,))


class Custom(Rule):
    """The user's own rule: what they wrote runs forward, says what is kept, and runs backward."""

    takes_zeros = True

    def keeps(self):
        return "what the user's function returns for it"

    def prepare(self, site):
        return jax_step(site)


ON_TANGENTS = Call("custom_jvp_call", "y = f(x), linear;  x̄ = fᵀ(ȳ)")

RULES = [
    Jit("jit", "y = f(x) compiled;  x̄ = fᵀ(ȳ) compiled"),
    *[
        Call(name, "y = f(x);  x̄ = fᵀ(ȳ)")
        for name in ("call", "closed_call", "composite", "custom_vmap_call", "eval_jaxpr")
    ],
    Cond(),
    While(),
    CustomJVP("custom_jvp_call", "y = f(x), ẏ = J ẋ as the user gave it;  x̄ = Jᵀ ȳ"),
    Custom("custom_vjp_call", "y, kept = fwd(x);  x̄ = bwd(kept, ȳ) as the user gave them"),
    Custom("linear_call", "y = f(r) x;  x̄ = transpose(r) ȳ as the user gave it"),
]
