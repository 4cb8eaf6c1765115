"""Learning rules that send the error back through other weights than those of the forward pass."""

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
from fbprop.learning.product import fed, with_feedback
from fbprop.learning.sweep import Loss, traced, weights_of
from fbprop.reverse import value_and_grad


class Feedback(Method):
    """A feedback weight for every weight, and how it learns; its memory is a dict by path.

    Args:
      start: ``(key, w) -> state``, a pytree of arrays, of w's shape or scalars.
      weight: ``(state, w) -> (b, state)``: the feedback weight for this step.
      learn: ``(state, w, update) -> (update, state)`` once the optimiser has made the update.
    """

    def __init__(self, start: Callable, weight: Callable, learn: Callable | None = None):
        super().__init__(self._start, self._direction, None if learn is None else self._learn)
        self.start, self.weight, self.learn = start, weight, learn

    def _start(self, key, loss, params, *args):
        traced_loss = traced(loss, params, args)
        (memory,) = start(traced_loss, key, params, [self], [0] * len(traced_loss.names))
        return memory

    def _direction(self, loss, has_aux, options, params, args, memory):
        traced_loss = traced(loss, params, args)
        which = [0] * len(traced_loss.names)
        found, (memory,) = direction(traced_loss, has_aux, options, params, [self], which, [memory])
        return found, memory

    def _learn(self, updates, params, memory):
        weights = dict(zip(names_of(params), tree_leaves(params)))
        memory = dict(memory)

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
    for i in weights_of(loss, params, numbers):
        w = jnp.asarray(leaves[i])
        memories[which[i]][loss.names[i]] = methods[which[i]].start(jax.random.fold_in(key, i), w)
    return memories


def direction(loss: Loss, has_aux, options, params, methods, which, memories):
    """Value and direction by all of them in one sweep; leaves without a method get gradients."""
    leaves, feedback, new = tree_leaves(params), {}, [{} for _ in methods]
    for k, memory in enumerate(memories):
        check_memory(memory, {n: x for n, x, m in zip(loss.names, leaves, which) if m == k})
    for i, (name, k) in enumerate(zip(loss.names, which)):
        if k is None:
            continue
        feedback[i] = leaves[i]
        if name in memories[k]:
            b, new[k][name] = methods[k].weight(memories[k][name], leaves[i])
            feedback[i] = b.astype(jnp.result_type(leaves[i]))
    known = {i for i, (name, k) in enumerate(zip(loss.names, which))
             if k is not None and name in memories[k]}

    def product(eqn, values, at, place):
        weight, arrays = values[at], [v.array for v in values]
        if not weight.mark.is_weight:
            return jc.bind(eqn, arrays)
        if missing := weight.mark.leaves - known:
            raise ValueError(
                "A method's memory belongs to one network, got none for "
                f"{loss.names[min(missing)]!r}, a weight here: make it with "
                "method.init(key, loss, params, *args) for this loss."
            )
        return fed(eqn, arrays, at, weight.feedback)

    def fed_loss(params):
        return loss.result(tree_leaves(params), product, feedback)

    table = options.get("rules")
    table = _rules.current() if table is None else table
    options = options | {"rules": with_feedback(table) if isinstance(table, Table) else table}
    return value_and_grad(fed_loss, has_aux=has_aux, **options)(params), new


def drawn(key, w, scale):
    """Normal numbers of w's shape and, times ``scale``, of w's size; of a w of 0, 1/√inputs."""
    size = jnp.sqrt(jnp.mean(jnp.square(w)))
    inputs = jnp.asarray(max(w.size // max(w.shape[-1:] + (1,)), 1), w.dtype)
    size = jnp.where(size > 0, size, 1 / jnp.sqrt(inputs))
    return jnp.asarray(scale, w.dtype) * size * jax.random.normal(key, w.shape, w.dtype)


def feedback_alignment(*, scale: float = 1.0) -> Feedback:
    """Fixed random feedback: x̄ = ȳ Bᵀ in the place of ȳ Wᵀ, and W̄ = xᵀ ȳ as ever.

    Of every product of data with a weight: dense, convolution of any kind, projection, gates of
    recurrent cells, whatever package wrote it. What is no product with a weight keeps its own
    derivative: biases, scales, looked-up embeddings, attention's scores. Forward weights come to
    align with B, so that errors arrive as usable as by backpropagation.

    | stored | of each weight | B, of its shape |
    |---|---|---|
    | cost | products | as backpropagation, and B is read for W |

    Source: Lillicrap, Cownden, Tweed, Akerman 2016 (Nature Communications 7:13276).

    Args:
      scale: B is normal, with the root mean square of the initial weight times this; of a weight
        that starts at 0, 1/√inputs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> def loss(params, x):
      ...     return jnp.mean(jnp.tanh(x @ params["a"]) @ params["b"])
      >>> params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 1))}, jnp.ones((2, 3))
      >>> method = learning.feedback_alignment()
      >>> memory = method.init(jax.random.key(0), loss, params, x)
      >>> sorted(memory), memory["b"].shape
      (['a', 'b'], (4, 1))
      >>> (value, direction), memory = method.value_and_grad(loss)(params, x, memory=memory)
      >>> direction["a"].shape
      (3, 4)
    """
    return Feedback(lambda key, w: drawn(key, w, scale), lambda b, w: (b, b))


FORMS = ("uniform", "batch_random", "fixed_random")


def sign_symmetry(form: str = "fixed_random", *, scale: float = 1.0) -> Feedback:
    """Feedback with the weight's signs and other sizes: B = M ⊙ sign W.

    | form | M | stored of each weight |
    |---|---|---|
    | "uniform" (uSF) | one number, the size of W at first | the number |
    | "batch_random" (brSF) | sizes of normal numbers, new in every step | the number and a key |
    | "fixed_random" (frSF) | sizes of normal numbers, the same throughout | M |

    The cost is backpropagation's, and for brSF that of the numbers. sign 0 = 0.

    Source: Liao, Leibo, Poggio 2016 (arXiv 1510.05067); Xiao, Chen, Liao, Poggio 2018
    (arXiv 1811.03567).

    Args:
      form: one of the three.
      scale: M has the root mean square of the initial weight times this.

    Raises:
      ValueError: another form.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> loss = lambda w, x: jnp.mean(x @ w)
      >>> memory = learning.sign_symmetry("uniform").init(
      ...     jax.random.key(0), loss, -2 * jnp.ones((3, 1)), jnp.ones((2, 3)))
      >>> {k: float(size) for k, size in memory.items()}
      {'': 2.0}
    """
    if form not in FORMS:
        raise ValueError(f"Sign symmetry has three forms, got {form!r} expected one of {FORMS}.")

    def size(w):
        return jnp.asarray(scale, w.dtype) * jnp.sqrt(jnp.mean(jnp.square(w)))

    if form == "uniform":
        return Feedback(lambda key, w: size(w), lambda s, w: (s * jnp.sign(w), s))
    if form == "fixed_random":
        return Feedback(
            lambda key, w: jnp.abs(drawn(key, w, scale)), lambda m, w: (m * jnp.sign(w), m)
        )

    def weight(state, w):
        key, now = jax.random.split(state["key"])
        sizes = jnp.abs(jax.random.normal(now, w.shape, w.dtype))
        return state["size"] * sizes * jnp.sign(w), {"key": key, "size": state["size"]}

    return Feedback(lambda key, w: {"key": key, "size": size(w)}, weight)


def kolen_pollack(decay: float = 1e-3, *, scale: float = 1.0) -> Feedback:
    """Feedback that learns to be the transpose: B gets W's updates, and both decay alike.

    x̄ = ȳ Bᵀ;  after each step W ← (1 − λ) W + ΔW and B ← (1 − λ) B + ΔW, so that W − B shrinks by
    1 − λ each step: no weight is ever read for another. ΔW, of any optimiser, is a product of what
    stands at either end of a synapse, so both sides can compute it.

    | stored | of each weight | B, of its shape |
    |---|---|---|
    | cost | products as backpropagation; `Method.update` adds ΔW to B | |

    Source: Kolen and Pollack 1994; Akrout et al. 2019 (arXiv 1904.05391).

    Args:
      decay: λ in [0, 1), applied here, on top of any that the optimiser has.
      scale: of the first B, as for `feedback_alignment`.

    Raises:
      ValueError: a decay outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> loss, w = lambda w, x: jnp.mean(x @ w), jnp.ones((3, 1))
      >>> method = learning.kolen_pollack(0.5)
      >>> memory = method.init(jax.random.key(0), loss, w, jnp.ones((2, 3)))
      >>> updates, new = method.update(jnp.zeros((3, 1)), w, memory)
      >>> updates.ravel().tolist(), bool(jnp.all(new[""] == memory[""] / 2))
      ([-0.5, -0.5, -0.5], True)
    """
    if not 0 <= decay < 1:
        raise ValueError(
            f"Kolen and Pollack's weights shrink by 1 − decay a step, got decay={decay} expected "
            "0 <= decay < 1: 1e-3 is usual."
        )

    def learn(b, w, update):
        rate = jnp.asarray(decay, b.dtype)
        return update - rate.astype(update.dtype) * w, b - rate * b + update.astype(b.dtype)

    return Feedback(lambda key, w: drawn(key, w, scale), lambda b, w: (b, b), learn)
