"""The backward sweep of a loop, its products put off to the end of a chunk of steps.

A weight used in every step gets a cotangent from every step: a small product, x̄ᵀȳ over the batch,
and a sum as large as the weight. Both are memory-bound. A chunk of steps collects the factors
instead, and does one product over batch and steps: an LSTM of 512 units, batch 16, 256 steps,
takes 0.6 of the time (`python -m benchmarks --only lstm`). What the scanned operands get (ȳWᵀ) is
put off likewise, and rows of a table are added where they belong without a table per step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.factored import Contraction, Factored, Sums
from fbprop.core.halves import evaluate


def chunk_size(length: int) -> int | None:
    """Steps per product, a divisor of their number; None: all.

    From 8 to 16 there is little between them in time; a chunk collects its factors and copies what
    it reads, so that it should be a small part of the whole: 64 steps of an LSTM (B 32, H 128) take
    0.82 of `jax.grad`'s memory in chunks of 16, 0.70 in chunks of 8. A number of steps that none
    divides is worked through at once, which collects as much as it keeps.
    """
    preferred = range(16, 7, -1) if length >= 256 else range(8, 17)
    return next((n for n in (*preferred, *range(17, 65), 7, 6, 5, 4) if length % n == 0), None)


def in_chunks(run, state, xs, length: int, size: int | None, reverse: bool):
    """``run(state, xs of some steps, how many) -> state, ys``, chunk after chunk."""
    if size is None or size == length:
        return run(state, xs, length)
    n = length // size
    xs = jax.tree.map(lambda x: x.reshape(n, size, *x.shape[1:]), xs)
    state, ys = lax.scan(
        lambda state, xs: run(state, xs, size), state, xs, length=n, reverse=reverse
    )
    return state, jax.tree.map(lambda y: y.reshape(length, *y.shape[2:]), ys)


def _is_view(eqn):
    """Whether a result is the operand's elements in their order, with other unit dimensions."""
    views = "broadcast_in_dim", "reduce_sum", "reshape", "squeeze"
    return eqn.primitive.name in views and eqn.invars[0].aval.size == eqn.outvars[0].aval.size


class Sweep:
    """One backward run of a `Loop`.

    Attributes:
      size: `chunk_size`.

    Args:
      loop: the `Loop`.
      leaves: what the forward run kept; stepping: which of them have steps along their first axis.
      dcarry: cotangents of the last carry; dys: of the stacked results.
    """

    size = staticmethod(chunk_size)

    def __init__(self, loop, leaves, stepping, dcarry, dys):
        self.loop, self.leaves, self.stepping, self.dys = loop, leaves, stepping, dys
        one_step = jax.make_jaxpr(lambda dys: [jnp.sum(d, 0) for d in jax.tree.leaves(dys)])(dys)
        dys = jax.tree.unflatten(jax.tree.structure(dys), jc.out_avals(one_step))

        def step(leaves, dcarry, dys):
            return loop.both.backward(leaves, [*dcarry, *dys])

        self.step, dins = jax.make_jaxpr(step, return_shape=True)(
            [v.aval for v in loop.both.stored], dcarry, dys
        )
        outs, invars = jc.open_jaxpr(self.step).outvars, jc.open_jaxpr(self.step).invars
        # The cotangents of the body's inputs, atoms of the step's jaxpr in place of arrays.
        self.dins = jax.tree.unflatten(jax.tree.structure(dins), outs)
        self.leaf = {v: i for i, v in enumerate(invars[: len(leaves)])}
        a, b = loop.n_consts, loop.n_consts + loop.n_carry
        self.late = [self._is_late(d, i < a) and not a <= i < b for i, d in enumerate(self.dins)]
        late = [d for d, late in zip(self.dins, self.late) if late]
        factors = dict.fromkeys(f for d in late for f in jax.tree.leaves(d))
        self.collected = [f for f in factors if f not in self.leaf]
        self._put_off_sums(range(a), factors)

    def _is_late(self, d, summed):
        """Whether the product can wait: its factors are there, or can be collected."""
        if self.loop.frugal or not isinstance(d, Factored):
            return False
        if not all(map(jc.is_var, jax.tree.leaves(d))):
            return False
        steps = [self._steps(f) for f in jax.tree.leaves(d)]
        return all(steps) if summed else isinstance(d, Contraction) and sum(steps) == 1

    def _put_off_sums(self, consts, factors):
        """The sums of what products wait for anyway (a bias's cotangent) wait with them.

        Of a batch that devices share, each sum would be sent at every step.
        """
        made_by = {v: eqn for eqn in jc.open_jaxpr(self.step).eqns for v in eqn.outvars}
        for i in consts:
            d = self.dins[i]
            eqn = None if isinstance(d, Factored) or ct.is_zero(d) else made_by.get(d)
            while eqn is not None and _is_view(eqn):
                eqn = made_by.get(eqn.invars[0])
            if eqn is not None and eqn.primitive.name == "reduce_sum" and eqn.invars[0] in factors:
                self.dins[i] = Sums(eqn.invars[0], eqn.params["axes"], d.aval.shape)
                self.late[i] = True

    def _steps(self, atom):
        """Whether an atom of the step has a value per step."""
        return atom not in self.leaf or self.stepping[self.leaf[atom]]

    def run(self, dcarry):
        """Cotangents of the loop's constants, of its first carry, and of its scanned operands."""
        loop = self.loop
        zeros = [
            ct.dense(ct.ZERO, v) if r else ct.ZERO for v, r in zip(loop.in_avals, loop.reached)
        ]
        xs = [x for x, s in zip(self.leaves, self.stepping) if s], self.dys
        size = self.size(loop.length) if any(self.late) else None
        state = zeros[: loop.n_consts], dcarry
        (dconsts, dcarry), dxs = in_chunks(
            self._chunk, state, xs, loop.length, size, not loop.reverse
        )
        return dconsts, dcarry, dxs

    def _chunk(self, state, xs, length):
        """Some steps, and after them the products that could wait."""
        a, b = self.loop.n_consts, self.loop.n_consts + self.loop.n_carry
        dconsts, dcarry = state
        now = [ct.ZERO if late else total for total, late in zip(dconsts, self.late)]

        def body(state, xs):
            dconsts, dcarry = state
            dins, collected = self._one_step(dcarry, *xs)
            dconsts = [ct.add(total, d) for total, d in zip(dconsts, dins[:a])]
            return (dconsts, dins[a:b]), (dins[b:], collected)

        (now, dcarry), (dxs, collected) = lax.scan(
            body, (now, dcarry), xs, length=length, reverse=not self.loop.reverse,
            unroll=self.loop.unroll,
        )
        values = self._factors(xs[0], collected)
        dconsts = [
            self._summed(d.over_steps(*(values[f] for f in jax.tree.leaves(d))), total)
            if late else n
            for total, n, d, late in zip(dconsts, now, self.dins, self.late)
        ]
        dxs = [
            d.each_step(values[d.x], values[d.y], int(self._steps(d.y))).dense() if late else n
            for n, d, late in zip(dxs, self.dins[b:], self.late[b:])
        ]
        return (dconsts, dcarry), dxs

    def _summed(self, d, total):
        """The sum over a chunk's steps, and over those of the chunks before."""
        return d.add_to(total)

    def _one_step(self, dcarry, stepping, dys):
        """Cotangents of the body's inputs, ZERO where they wait, and the factors to collect."""
        a, b = self.loop.n_consts, self.loop.n_consts + self.loop.n_carry
        dins = [ct.ZERO if late else d for d, late in zip(self.dins, self.late)]
        atoms, tree = jax.tree.flatten(dins)
        args = jax.tree.leaves((self._leaves(stepping), dcarry, dys))
        values = evaluate(self.step, args, [*atoms, *self.collected])
        dins = [*map(ct.evaluated, jax.tree.unflatten(tree, values[: len(atoms)]))]
        fill = [
            *(False,) * a, *self.loop.wanted_carry,
            *(r and not late for r, late in zip(self.loop.reached[b:], self.late[b:])),
        ]
        dins = [ct.dense(d, v) if f else d for d, v, f in zip(dins, self.loop.in_avals, fill)]
        carry = [d if w else ct.ZERO for d, w in zip(dins[a:b], self.loop.wanted_carry)]
        return [*dins[:a], *carry, *dins[b:]], values[len(atoms) :]

    def _leaves(self, stepping):
        """All leaves, of one step or of several, from those of them that have steps."""
        its = iter(stepping)
        return [next(its) if s else x for x, s in zip(self.leaves, self.stepping)]

    def _factors(self, stepping, collected):
        """Values of the factors that were waited for, by atom; those of steps along axis 0."""
        leaves = self._leaves(stepping)
        return {v: leaves[i] for v, i in self.leaf.items()} | dict(zip(self.collected, collected))
