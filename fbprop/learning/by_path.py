"""A learning rule for each group of parameters, and hybrids with backpropagation."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.tree_util import tree_flatten, tree_leaves, tree_unflatten

from fbprop.learning.feedback import Feedback, direction, start
from fbprop.learning.method import BACKPROP, Method, check_method
from fbprop.learning.names import assigned, names_of
from fbprop.learning.sweep import traced
from fbprop.reverse import value_and_grad


def by_path(rules: Mapping[str, Method]) -> Method:
    """Another learning rule for each group of parameters.

    Rules with feedback, and backpropagation, act together in one backward sweep: the error reaches
    the encoder through the head's own weights if the head has backpropagation. Any other rule makes
    its own direction of the whole network, of which its group takes its part.

    Args:
      rules: pattern on paths -> rule. Every parameter belongs to the first pattern that matches its
        path; a parameter's path is its keys joined by ``/``.

    Returns:
      A rule whose memory is a tuple, of each pattern's.

    Raises:
      ValueError: a pattern matches no parameter, or none that no other has before; a parameter
        that no pattern matches.
      TypeError: no dict, an empty one, or something in it that is no rule.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> def loss(params, x):
      ...     return jnp.mean(jnp.tanh(x @ params["body"]) @ params["head"])
      >>> params, x = {"body": jnp.ones((3, 4)), "head": jnp.ones((4, 1))}, jnp.ones((2, 3))
      >>> method = learning.by_path({
      ...     "head": learning.feedback_alignment(), "*": learning.backprop()})
      >>> memory = method.init(jax.random.key(0), loss, params, x)
      >>> [sorted(m) for m in memory]
      [['head'], []]
      >>> (value, direction), memory = method.value_and_grad(loss)(params, x, memory=memory)
    """
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(
            f"Learning rules are a dict from pattern to rule, got {rules!r} expected e.g. "
            '{"encoder/*": learning.feedback_alignment(), "*": learning.backprop()}.'
        )
    for method in rules.values():
        check_method(method)
    return _ByPath(tuple(rules), list(rules.values()))


class _ByPath(Method):
    def __init__(self, patterns, methods):
        super().__init__(self._start, self._direction, self._learn)
        self.patterns, self.methods = patterns, methods

    def _fed(self, which):
        """Per leaf the number of its method, if that has feedback."""
        return [k if isinstance(self.methods[k], Feedback) else None for k in which]

    def _start(self, key, loss, params, *args):
        which = assigned(self.patterns, names_of(params))
        fed = self._fed(which)
        memories = [{} for _ in which]
        if any(k is not None for k in fed):
            memories = start(traced(loss, params, args), key, params, self.methods, fed)
        return tuple(
            memories[k] if isinstance(m, Feedback)
            else m.init(jax.random.fold_in(key, len(which) + k), loss, params, *args)
            for k, m in enumerate(self.methods)
        )

    def _direction(self, loss, has_aux, options, params, args, memory):
        which = assigned(self.patterns, names_of(params))
        self._check(memory)
        fed, new, found = self._fed(which), list(memory), {}
        if any(isinstance(self.methods[k], Feedback) for k in which):
            dicts = [m if isinstance(method, Feedback) else {}
                     for m, method in zip(memory, self.methods)]
            found[None], dicts = direction(
                traced(loss, params, args), has_aux, options, params, self.methods, fed, dicts
            )
            for k, method in enumerate(self.methods):
                new[k] = dicts[k] if isinstance(method, Feedback) else new[k]
        elif any(self.methods[k] is BACKPROP for k in which):
            found[None] = value_and_grad(loss, has_aux=has_aux, **options)(params, *args)
        for k, method in enumerate(self.methods):
            if not (isinstance(method, Feedback) or method is BACKPROP):
                run = method.value_and_grad(loss, has_aux, **options)
                found[k], new[k] = run(params, *args, memory=memory[k])
        leaves = {k: tree_leaves(d) for k, (_, d) in found.items()}
        mine = [leaves[k if k in leaves else None][i] for i, k in enumerate(which)]
        value = next(iter(found.values()))[0]
        return (value, tree_unflatten(jax.tree.structure(params), mine)), tuple(new)

    def _learn(self, updates, params, memory):
        self._check(memory)
        which = assigned(self.patterns, names_of(params))
        new, chosen = list(memory), [*which]
        for k, method in enumerate(self.methods):
            changed, new[k] = method.update(updates, params, memory[k])
            # Frozen parameters have None in the place of an update.
            leaves, tree = tree_flatten(changed, is_leaf=lambda x: x is None)
            chosen = [x if w == k else c for x, w, c in zip(leaves, which, chosen)]
        return tree_unflatten(tree, chosen), tuple(new)

    def _check(self, memory):
        if not isinstance(memory, tuple) or len(memory) != len(self.methods):
            raise ValueError(
                "The memory of rules by path is a tuple with one part per pattern, got "
                f"{type(memory).__name__} of {len(memory) if hasattr(memory, '__len__') else 0} "
                f"expected {len(self.methods)}: memory = method.init(key, loss, params, *args)."
            )
