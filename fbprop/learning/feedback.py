"""Learning rules that send the error back another way than through the weights it came by."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves, tree_map_with_path

from fbprop import rules as _rules
from fbprop.core import jaxcompat as jc
from fbprop.core.table import Table
from fbprop.learning.method import Method
from fbprop.learning.names import check_memory, names_of
from fbprop.learning.noise import reflected
from fbprop.learning.own_derivative import CUSTOM, fed_by_its_own
from fbprop.learning.product import fed, with_feedback
from fbprop.learning.sweep import Loss, traced, uses_of
from fbprop.reverse import value_and_grad


class Feedback(Method):
    """A feedback weight for every weight, and how it learns; its memory is a dict by path.

    Args:
      start: ``(key, w) -> state``, a pytree of arrays.
      weight: ``(state, w) -> (b, state)``: the feedback weight, like w, for this step, and the
        state after it.
      learn: ``(state, w, update) -> (update, state)`` once the optimiser has made the update; or
        None.
      reflect: ``(state, seen) -> state``, if it learns from ``seen``, an estimate of w by noise
        (`weight_mirror`); the state then has a random key.

    Weights that meet only data that depend on no parameter, those of a first layer, need none. In a
    `jax.shard_map` each device's part of a weight has the same part of its feedback weight. Of a
    `jax.custom_vjp` or `jax.custom_jvp` that is linear in data and in a weight, its first two
    operands, the error comes by its own derivative at the feedback weight; one that does more is
    refused, as its backward pass may read the weight anywhere.

    Example: feedback by the weight's transpose, which is backpropagation.
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> method = learning.Feedback(lambda key, w: (), lambda state, w: (w, state))
      >>> loss = lambda w, x: jnp.sum(x @ w)
      >>> memory = method.init(jax.random.key(0), loss, jnp.ones((2, 1)), jnp.ones((3, 2)))
      >>> memory
      {}
    """

    def __init__(self, start: Callable, weight: Callable, learn: Callable | None = None,
                 reflect: Callable | None = None):
        super().__init__(self._start, self._direction, None if learn is None else self._learn)
        self.start, self.weight, self.learn, self.reflect = start, weight, learn, reflect

    def _start(self, key, loss, params, *args):
        which = [0] * len(names_of(params))
        (memory,) = start(traced(loss, params, args), key, params, [self], which)
        return memory

    def _direction(self, loss, has_aux, options, params, args, memory):
        loss = traced(loss, params, args)
        which = [0] * len(loss.names)
        found, (memory,) = direction(loss, has_aux, options, params, [self], which, [memory])
        return found, memory

    def _learn(self, updates, params, memory):
        weights, memory = dict(zip(names_of(params), tree_leaves(params))), dict(memory)

        def one(path, update):
            name = keystr(path, simple=True, separator="/")
            if name not in memory:
                return update
            update, memory[name] = self.learn(memory[name], weights[name], update)
            return update

        return tree_map_with_path(one, updates), memory


def start(loss: Loss, key, params, methods, which) -> list[dict]:
    """The memories of several such methods, by the method's number of each leaf (None: none)."""
    numbers = [i for i, k in enumerate(which) if k is not None]
    leaves, memories = tree_leaves(params), [{} for _ in methods]
    needed = {i for use in uses_of(loss, params, numbers) if use.active for i in use.leaves}
    for i in sorted(needed):
        w = jnp.asarray(leaves[i])
        memories[which[i]][loss.names[i]] = methods[which[i]].start(jax.random.fold_in(key, i), w)
    return memories


def direction(loss: Loss, has_aux, options, params, methods, which, memories):
    """Value and direction by all of them in one sweep; leaves without a method get gradients."""
    leaves = tree_leaves(params)
    feedback, new = weights_now(loss, leaves, methods, which, memories)
    known = {i for i, (name, k) in enumerate(zip(loss.names, which)) if k is not None
             and name in memories[k]}

    def product(eqn, values, at, place):
        weight, arrays = values[at].mark, [v.array for v in values]
        if not weight.is_weight or not values[1 - at].mark.leaves:
            return jc.bind(eqn, arrays)
        if missing := weight.leaves - known:
            raise ValueError(
                "A method's memory belongs to one network, got none for "
                f"{loss.names[min(missing)]!r}, a weight here: make it with "
                "method.init(key, loss, params, *args) for this loss."
            )
        send = fed_by_its_own if eqn.primitive.name in CUSTOM else fed
        return send(eqn, arrays, at, values[at].feedback)

    def fed_loss(params):
        return loss.result(tree_leaves(params), product, feedback)

    new = reflected(loss, leaves, methods, which, new)
    return value_and_grad(fed_loss, has_aux=has_aux, **with_rule(options))(params), new


def weights_now(loss: Loss, leaves, methods, which, memories):
    """Per leaf that has a method its feedback weight, and the memories after this step."""
    feedback, new = {}, [{} for _ in methods]
    for k, (method, memory) in enumerate(zip(methods, memories)):
        mine = {n: jnp.asarray(x) for n, x, m in zip(loss.names, leaves, which) if m == k}
        check_memory(memory, {n: jax.eval_shape(method.start, jax.random.key(0), w)
                              for n, w in mine.items() if n in memory})
    for i, (name, k) in enumerate(zip(loss.names, which)):
        if k is None:
            continue
        feedback[i] = leaves[i]
        if name in memories[k]:
            b, new[k][name] = methods[k].weight(memories[k][name], leaves[i])
            feedback[i] = b.astype(jnp.result_type(leaves[i]))
    return feedback, new


def with_rule(options):
    """The options of `fbprop.value_and_grad`, with the rule for fed products in the table."""
    table = options.get("rules")
    table = _rules.current() if table is None else table
    return options | {"rules": with_feedback(table) if isinstance(table, Table) else table}
