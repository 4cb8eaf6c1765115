"""A chain of layers run one piece after another, each learning before the next is computed.

Where a layer's error does not come through the layers above, nothing has to be kept for them: of a
piece between two weighted products the values are gone once its parameters' direction is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves, tree_unflatten

from fbprop.core import jaxcompat as jc
from fbprop.core.halves import needed_equations
from fbprop.core.opaque import held
from fbprop.learning.sweep import Loss, uses_of
from fbprop.reverse import vjp


def in_pieces(loss: Loss, params, error, sent: Callable, options) -> tuple[Any, Any]:
    """The loss's result, and the direction.

    Args:
      error: the output's; all of this is computed once it is known.
      sent: ``(use, x, error) -> x̄`` for a product's input.

    Raises:
      ValueError: what one piece hands to the next is more than the input of a product.
    """
    chain = Chain(loss, params)
    env = chain.start([held(jnp.asarray(x), error) for x in loss.args])
    total = [jnp.zeros_like(x) for x in chain.leaves]
    for start, stop in zip(chain.cuts, chain.cuts[1:]):
        mine = chain.parameters(start, stop)
        end, pull, values = vjp(
            lambda values: chain.piece(env, start, stop, dict(zip(mine, values))),
            [chain.leaves[i] for i in mine], has_aux=True, **options,
        )
        made, use = dict(zip(chain.handed(start, stop), values)), chain.uses.get(stop)
        back = jnp.ones_like(end) if use is None else sent(use, end, held(error, end))
        (found,) = pull(back)
        for i, d in zip(mine, found):
            total[i] = total[i] + d
        if use is not None and found:
            # XLA would compute all pieces, and keep what is in them, before any of the directions.
            made[chain.end(stop)] = held(end, max(found, key=lambda d: d.size))
        env |= made
    return chain.result(env), tree_unflatten(loss.tree, total)


class Chain:
    """The loss's equations, cut before the products whose input depends on parameters."""

    def __init__(self, loss: Loss, params):
        self.leaves = [*map(jnp.asarray, tree_leaves(params))]
        self.loss = loss._replace(jaxpr=_flat(loss, self.leaves))
        self.body = jc.open_jaxpr(self.loss.jaxpr)
        uses = uses_of(self.loss, params, range(len(self.leaves)), every=True)
        self.uses = {use.place[0]: use for use in uses if use.active}
        self.cuts = [0, *sorted(self.uses), len(self.body.eqns)]
        self.number = dict(zip(self.body.invars, range(len(self.leaves))))
        depend = set(self.number)
        for eqn in self.body.eqns:
            if not depend.isdisjoint(v for v in eqn.invars if jc.is_var(v)):
                depend.update(v for v in eqn.outvars if jc.differentiable(v.aval))
        counts = needed_equations(self.loss.jaxpr, self.body.outvars[:1], {})
        for stop, use in self.uses.items():
            before = {v for eqn in self.body.eqns[:stop] for v in eqn.outvars}
            after = [eqn for eqn in self.body.eqns[stop + 1 :] if eqn in counts]
            across = before & depend & {v for e in after for v in e.invars if jc.is_var(v)}
            if across:
                raise ValueError(
                    "Layers are computed again one by one where each hands only its result to the "
                    f"next, got {len(across)} more values past the product with "
                    f"{self.loss.names[min(use.leaves)]!r}: leave recompute=True out."
                )

    def start(self, args):
        """Values of what is known before the first equation."""
        known = zip(self.body.constvars, jc.consts_of(self.loss.jaxpr))
        return dict(known) | dict(zip(self.body.invars[len(self.leaves):], args))

    def end(self, stop):
        """The variable that a piece ends with: the next product's input, or the loss."""
        if stop not in self.uses:
            return self.body.outvars[0]
        return self.body.eqns[stop].invars[1 - self.uses[stop].at]

    def handed(self, start, stop):
        """What is made in a piece and needed later."""
        later = [v for eqn in self.body.eqns[stop:] for v in eqn.invars] + self.body.outvars
        later = {v for v in later if jc.is_var(v)}
        return [v for eqn in self.body.eqns[start:stop] for v in eqn.outvars if v in later]

    def parameters(self, start, stop):
        """Numbers of the parameters that a piece reads."""
        read = {v for eqn in self.body.eqns[start:stop] for v in eqn.invars if jc.is_var(v)}
        return [i for v, i in self.number.items() if v in read]

    def piece(self, env, start, stop, values):
        """What a piece ends with, and what is handed on."""
        env = env | {v: values[i] for v, i in self.number.items() if i in values}
        for eqn in self.body.eqns[start:stop]:
            operands = [env[v] if jc.is_var(v) else v.val for v in eqn.invars]
            env.update(zip(eqn.outvars, jc.bind(eqn, operands)))
        return env[self.end(stop)], [env[v] for v in self.handed(start, stop)]

    def result(self, env):
        env = env | {v: self.leaves[i] for v, i in self.number.items()}
        outs = [env[v] if jc.is_var(v) else jc.literal(v) for v in self.body.outvars]
        return tree_unflatten(self.loss.out_tree, outs)


def _flat(loss, leaves):
    """The loss with what it calls written out."""
    def product(eqn, values, at, place):
        return jc.bind(eqn, [v.array for v in values])

    def run(leaves, args):
        whole = loss._replace(args=args)
        return tree_leaves(whole.result(leaves, product, dict(enumerate(leaves)), True))

    return jax.make_jaxpr(run)(leaves, loss.args)
