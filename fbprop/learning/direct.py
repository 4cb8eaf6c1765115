"""The output's error sent to every layer at once: direct feedback alignment."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr, tree_leaves, tree_map_with_path

from fbprop.core import jaxcompat as jc
from fbprop.core.opaque import held
from fbprop.learning.learned_feedback import check_decay
from fbprop.learning.method import Method
from fbprop.learning.names import check_memory
from fbprop.learning.pieces import in_pieces
from fbprop.learning.sweep import Loss, Use, traced, uses_of
from fbprop.learning.trace import BRANCH, LOOP, SHARDS
from fbprop.reverse import grad, value_and_grad


def direct_feedback_alignment(*, scale: float = 1.0, recompute: bool = False) -> Method:
    """Every layer's input gets the output's error through a random matrix: x̄ = ē B.

    e, the last weighted product's result, gets its own cotangent ē; the input x of every weighted
    product gets ē B in the place of what comes through that product, and W̄ = xᵀ ȳ, with ȳ what x's
    like of the next layer sends back through activations, biases and whatever else is between.
    Nothing waits for the layers above. Leading dimensions (examples, tokens) that ē and x share
    stay apart; the others are those of B, [sizes of ē's rest, of x's rest].

    The paper's layers stand in a row, each with a weight of its own that it uses once. What ē of
    one time step would be to another one of a recurrent cell, or to either place of a weight used
    twice, it does not say, and to add up all of ē for each would be another rule: both are refused,
    and `feedback_alignment`, which follows the network, serves them.

    | stored | of each product but those of a first layer | B |
    |---|---|---|
    | cost | a product with B for one with W: of 16 layers of 256, 0.7 of the operations | |

    XLA forms all layers' x̄ at once, so a compiled step of 16 layers takes 1.9 of backpropagation's
    temporary memory, unless it is told to recompute.

    Source: Nøkland 2016 (arXiv 1609.01596).

    Args:
      scale: B is normal, its standard deviation this over √(sizes of x's rest).
      recompute: once ē is known, run the network again, layer by layer, and keep nothing of either
        time: a compiled step of 16 dense layers then takes 0.2 of backpropagation's temporary
        memory and 1.04 of its operations. For chains of layers.

    Raises:
      ValueError: a product in a loop, a branch or a ``shard_map``, a weight used twice, a layer's
        input that shares no leading dimension with the output's error, or no chain to recompute.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> def loss(params, x):
      ...     return jnp.mean(jnp.tanh(x @ params["a"]) @ params["b"])
      >>> params, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((5, 3))
      >>> method = learning.direct_feedback_alignment()
      >>> memory = method.init(jax.random.key(0), loss, params, x)
      >>> {path: b.shape for path, b in memory.items()}
      {'b': (2, 4)}
      >>> (value, direction), memory = method.value_and_grad(loss)(params, x, memory=memory)
    """
    return _direct(scale, recompute, None)


def direct_kolen_pollack(
    rate: float, decay: float = 1e-3, *, scale: float = 1.0, recompute: bool = False
) -> Method:
    """Direct feedback that learns: B ← (1 − λ) B − η ēᵀ x, and W decays by 1 − λ as well.

    Of the last layer that is Kolen and Pollack's rule, and B comes to be Wᵀ; of the others, B comes
    to be what correlates their activity with the error.

    Stored as for `direct_feedback_alignment`; the cost is one product ēᵀ x per layer more.

    Source: Webster, Choi, Ahn 2021 (Learning the connections in direct feedback alignment); Kolen
    and Pollack 1994.

    Args:
      rate: η, that of the optimiser if that is plain gradient descent.
      decay: λ in [0, 1), applied by `Method.update` to the weights of these products.
      scale, recompute: as for `direct_feedback_alignment`.

    Raises:
      ValueError: as `direct_feedback_alignment`; a rate below 0 or a decay outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["a"]) @ p["b"])
      >>> params, x = {"a": jnp.zeros((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((5, 3))
      >>> method = learning.direct_kolen_pollack(0.1, decay=0.5)
      >>> memory = method.init(jax.random.key(0), loss, params, x)
      >>> _, new = method.value_and_grad(loss)(params, x, memory=memory)
      >>> bool(jnp.all(new["b"] == memory["b"] / 2))
      True
    """
    check_decay(decay)
    if not rate >= 0:
        raise ValueError(f"A rate of learning is not negative, got rate={rate}: 0.01 is usual.")
    return _direct(scale, recompute, (rate, decay))


def _direct(scale, recompute, learns):
    def init(key, loss, params, *args):
        loss = traced(loss, params, args)
        uses, output = layers(loss, params)
        memory = {}
        for i, use in enumerate(uses):
            _, k, n = _split(output, use, loss)
            draw = jax.random.normal(jax.random.fold_in(key, i), (k, n), use.x.dtype)
            memory[name_of(use, loss)] = draw * jnp.asarray(scale / math.sqrt(n), draw.dtype)
        return memory

    def value_and_direction(loss, has_aux, options, params, args, memory):
        loss = traced(loss, params, args)
        uses, output = layers(loss, params)
        expected = {
            name_of(use, loss): jax.ShapeDtypeStruct(_split(output, use, loss)[1:], use.x.dtype)
            for use in uses
        }
        check_memory(memory, expected)
        if missing := set(expected) - set(memory):
            raise ValueError(
                "A method's memory belongs to one network, got none for "
                f"{sorted(missing)[0]!r}: make it with method.init(key, loss, params, *args)."
            )
        error = output_error(loss, params, output, has_aux, options, apart=recompute)
        if recompute:
            moved = {}

            def sent(use, x, error):
                name = name_of(use, loss)
                if learns is not None:
                    moved[name] = _met(error, x, output, use, loss)
                return _sent(error, memory[name], output, use, loss)

            found, direction = in_pieces(loss, params, error, sent, options)
        else:
            found, direction, moved = _backward(
                loss, params, uses, output, error, memory, has_aux, options
            )
        return (found, direction), memory if learns is None else _learned(memory, moved, *learns)

    def update(updates, params, memory):
        return decayed(updates, params, memory, learns[1]), memory

    return Method(init, value_and_direction, None if learns is None else update)


def layers(loss: Loss, params) -> tuple[list[Use], Use]:
    """The products whose input depends on parameters, in order, and the last of all."""
    leaves = tree_leaves(params)
    uses = uses_of(loss, params, range(len(leaves)), every=True)
    if not uses:
        raise ValueError(
            "The output's error is that of the last product of data with a weight, got a loss "
            "without one: use learning.backprop()."
        )
    for use in uses:
        if {LOOP, BRANCH, SHARDS} & {*use.place}:
            raise ValueError(
                "Every layer's input meets the output's error, got a product with "
                f"{name_of(use, loss)!r} in a loop, a branch or a shard_map: use "
                "learning.backprop() or learning.feedback_alignment() for it."
            )
    names = [name_of(use, loss) for use in uses]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(
            f"Every layer has a way of its own to the output, got {twice[0]!r} in "
            f"{names.count(twice[0])} products expected one: use learning.feedback_alignment()."
        )
    return [use for use in uses if use.active], uses[-1]


def name_of(use: Use, loss: Loss) -> str:
    """The path of a product's weight, of several parameters all of them."""
    return " and ".join(loss.names[i] for i in sorted(use.leaves))


def output_error(loss: Loss, params, output: Use, has_aux, options, apart=False):
    """The cotangent of the last product's result: only what comes after it is differentiated."""
    leaves, feedback = tree_leaves(params), dict(enumerate(tree_leaves(params)))
    seen = []

    def note(eqn, values, at, place):
        arrays = [v.array for v in values]
        if apart:
            # Else XLA's compiler for CPUs makes one kernel of all layers, every bias at full size.
            arrays[1 - at] = held(arrays[1 - at], arrays[at])
        outs = jc.bind(eqn, arrays)
        if place == output.place:
            seen.append(outs[0])
        return outs

    loss.run(leaves, note, feedback, every=True)

    def tail(y):
        def swap(eqn, values, at, place):
            return [y] if place == output.place else jc.bind(eqn, [v.array for v in values])

        return loss.result(leaves, swap, feedback, every=True)

    found = grad(tail, has_aux=has_aux, **options)(seen[-1])
    return found[0] if has_aux else found


def _backward(loss, params, uses, output, error, memory, has_aux, options):
    """Value, direction, and per matrix B its gradient in Σ ⟨x, ē B⟩."""
    places = {use.place: use for use in uses}

    def cut(params, memory):
        leaves, sent = tree_leaves(params), []

        def product(eqn, values, at, place):
            arrays = [v.array for v in values]
            if place in places:
                x, use = arrays[1 - at], places[place]
                back = _sent(error, memory[name_of(use, loss)], output, use, loss)
                sent.append(jnp.sum(x * lax.stop_gradient(back)))
                sent.append(jnp.sum(lax.stop_gradient(x) * back))
                arrays[1 - at] = lax.stop_gradient(x)
            return jc.bind(eqn, arrays)

        out = loss.result(leaves, product, dict(enumerate(leaves)), every=True)
        value = out[0] if has_aux else out
        # Numbers of no meaning: what counts is that x's cotangent is ē B.
        return sum((s.astype(value.dtype) for s in sent), value), out

    run = value_and_grad(cut, (0, 1), has_aux=True, **options)
    (_, out), (direction, moved) = run(params, memory)
    return out, direction, moved


def _sent(error, b, output, use, loss):
    """ē B in the form of the layer's input."""
    lead, k, _ = _split(output, use, loss)
    back = error.reshape(lead, k).astype(b.dtype) @ b
    return back.reshape(use.x.shape)


def _met(error, x, output, use, loss):
    """ēᵀ x."""
    lead, k, n = _split(output, use, loss)
    return error.reshape(lead, k).astype(x.dtype).T @ x.reshape(lead, n)


def _split(output: Use, use: Use, loss: Loss) -> tuple[int, int, int]:
    """How many leading elements the output and a layer's input share, and the rest of either."""
    def firsts(shape):
        return {math.prod(shape[:i]) for i in range(1, len(shape))}

    shared = firsts(output.y.shape) & firsts(use.x.shape)
    if not shared:
        raise ValueError(
            "A layer's input and the output's error belong to the same examples along their first "
            f"dimensions, got {list(use.x.shape)} for {name_of(use, loss)!r} and "
            f"{list(output.y.shape)}: use learning.feedback_alignment()."
        )
    lead = max(shared)
    rests = (math.prod(t.shape) // max(lead, 1) for t in (output.y, use.x))
    return lead, *rests


def _learned(memory, moved, rate, decay):
    def one(b, d):
        return b - jnp.asarray(decay, b.dtype) * b - jnp.asarray(rate, b.dtype) * d

    return jax.tree.map(one, memory, moved)


def decayed(updates, params, memory, decay):
    """Updates of the weights that have feedback, with their own decay."""
    names = {name for path in memory for name in path.split(" and ")}

    def one(path, update, w):
        if update is None or keystr(path, simple=True, separator="/") not in names:
            return update
        return update - jnp.asarray(decay, update.dtype) * w.astype(update.dtype)

    return tree_map_with_path(one, updates, params, is_leaf=lambda x: x is None)
