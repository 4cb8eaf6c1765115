"""Forward gradients of activities: noise where layers' results are, instead of in the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_leaves, tree_unflatten

from fbprop.core import jaxcompat as jc
from fbprop.learning.method import Method
from fbprop.learning.perturbation import averaged, check_real, check_samples, start, times
from fbprop.learning.sweep import traced, uses_of
from fbprop.learning.trace import BRANCH, LOOP, SHARDS, said
from fbprop.reverse import grad


def activity_forward_gradient(
    *, samples: int = 1, per_example: int | tuple[int, ...] | None = None
) -> Method:
    """Forward gradients with noise on activities: ȳ ≈ (∇L · u) u, and W̄ = xᵀ ȳ; E W̄ = ∇L.

    u is normal noise on every product of data with a weight, y = x W + u, and on parameters that
    are in no such product, or in one in a loop, a branch or a ``shard_map``: all of them at once.
    There are fewer activities than weights where the batch is small, and then the variance is less.

    | stored | a random key |
    |---|---|
    | cost | two to three times the loss, and a product xᵀ ȳ per weight; x is kept for it |

    Source: Ren, Kornblith, Liao, Hinton 2023 (Scaling forward gradient with local losses, arXiv
    2210.03310), without their local losses.

    Args:
      samples: how many u the direction is the average of, one after the other.
      per_example: which of the loss's arguments after the parameters, from 0, are batches; the loss
        is a mean over their examples, as it is for batches of one. Each example then has a slope of
        its own, as in the paper: the variance is less by their number. None: one for the batch.

    Raises:
      ValueError: less than one sample; a weight that is not known as such; a product that is not of
        the batch's examples one after the other.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> method, loss = learning.activity_forward_gradient(), lambda w, x: jnp.sum(x @ w)
      >>> w, x = jnp.ones((3, 1)), jnp.ones((1, 3))
      >>> memory = method.init(jax.random.key(0), loss, w, x)
      >>> (value, direction), memory = method.value_and_grad(loss)(w, x, memory=memory)
      >>> float(value), bool(jnp.all(direction == direction[0]))
      (3.0, True)
    """
    check_samples(samples)
    which = (per_example,) if isinstance(per_example, int) else per_example

    def value_and_direction(loss, has_aux, options, params, args, memory):
        check_real(params)
        whole, leaves = traced(loss, params, args), [*map(jnp.asarray, tree_leaves(params))]
        one = whole if which is None else traced(loss, params, _examples(args, which, _first))
        noise = Noise(one, params, leaves, has_aux)

        def run(key):
            if which is None:
                found, on_results, on_leaves = noise.slopes(key, whole.args)
            else:
                found = loss(params, *args)
                on_results, on_leaves = _each(noise, key, args, which)
            moved = on_leaves | _weights(whole, leaves, noise.outer, on_results, options)
            return found, tree_unflatten(whole.tree, [moved[i] for i in range(len(leaves))])

        return averaged(run, memory, samples)

    return Method(start, value_and_direction)


class Noise:
    """Where the noise goes: on products' results, by place, and on other parameters, by number."""

    def __init__(self, loss, params, leaves, has_aux):
        self.loss, self.leaves, self.has_aux = loss, leaves, has_aux
        uses = uses_of(loss, params, range(len(leaves)))
        inner = {i for u in uses if {LOOP, BRANCH, SHARDS} & {*u.place} for i in u.leaves}
        self.uses = {repr(u.place): u for u in uses if not inner & u.leaves}
        self.outer = {i for use in self.uses.values() for i in use.leaves}

    def slopes(self, key, args):
        """The loss; and its slope along noise, times the noise."""
        others = [i for i in range(len(self.leaves)) if i not in self.outer]
        shapes = [*(u.y for u in self.uses.values()), *(self.leaves[i] for i in others)]
        draws = [jax.random.normal(k, s.shape, s.dtype)
                 for k, s in zip(jax.random.split(key, max(len(shapes), 1)), shapes)]
        on_results = dict(zip(self.uses, draws))
        on_leaves = dict(zip(others, draws[len(self.uses):]))
        loss = self.loss._replace(args=args)
        found, slope = _slope(loss, self.leaves, on_results, on_leaves, self.has_aux)
        return found, times(slope, on_results), times(slope, on_leaves)


def _each(noise, key, args, which):
    """Slopes of every example's own loss, along noise of its own, as of their mean."""
    n = len(tree_leaves(args[which[0]])[0])

    def of_example(key, *examples):
        at = dict(zip(which, examples))
        mine = [jax.tree.map(lambda x: x[None], at[i]) if i in at else a
                for i, a in enumerate(args)]
        return noise.slopes(key, tree_leaves(tuple(mine)))[1:]

    found = jax.vmap(of_example)(jax.random.split(key, n), *(args[i] for i in which))
    on_results = jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:]) / n, found[0])
    return on_results, jax.tree.map(lambda d: jnp.mean(d, 0), found[1])


def _examples(args, which, of):
    return tuple(jax.tree.map(of, a) if i in which else a for i, a in enumerate(args))


def _first(x):
    return x[:1]


def _slope(loss, leaves, on_results, on_leaves, has_aux):
    """The loss, and its derivative along the noise."""
    def disturbed(results, others):
        def product(eqn, values, at, place):
            (y,) = jc.bind(eqn, [v.array for v in values])
            return [y + results[repr(place)] if repr(place) in results else y]

        whole = [others.get(i, x) for i, x in enumerate(leaves)]
        return loss.result(whole, product, dict(enumerate(whole)))

    here = jax.tree.map(jnp.zeros_like, on_results), {i: leaves[i] for i in on_leaves}
    value, slope, *aux = jax.jvp(disturbed, here, (on_results, on_leaves), has_aux=has_aux)
    return ((value, *aux) if has_aux else value), slope


def _weights(loss, leaves, outer, cotangents, options):
    """xᵀ ȳ: gradients of Σ ⟨x W, ȳ⟩ with respect to these leaves, with x as it is."""
    def linear(mine):
        whole, sums = [mine.get(i, x) for i, x in enumerate(leaves)], []

        def product(eqn, values, at, place):
            arrays = [v.array for v in values]
            if repr(place) in cotangents:
                _check(eqn, cotangents[repr(place)])
                still = [*map(lax.stop_gradient, arrays)]
                still[at] = arrays[at]
                sums.append(jnp.sum(jc.bind(eqn, still)[0] * cotangents[repr(place)]))
            return jc.bind(eqn, arrays)

        loss.result(whole, product, dict(enumerate(whole)), True)
        if len(sums) != len(cotangents):
            raise ValueError(
                "A batch's loss has the products of one example's, got "
                f"{len(sums)} of {len(cotangents)} expected all: leave per_example out."
            )
        return sum((s.astype(float) for s in sums), jnp.zeros((), float))

    return grad(linear, **options)({i: leaves[i] for i in outer})


def _check(eqn, cotangent):
    got, expected = cotangent.shape, eqn.outvars[0].aval.shape
    if got != expected:
        raise ValueError(
            "Noise of each example's own is on results that stand one after the other in the "
            f"batch's, got {said(eqn)} of {list(expected)} expected {list(got)}: leave per_example "
            "out."
        )
