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
from fbprop.learning.trace import BRANCH, LOOP
from fbprop.reverse import grad


def activity_forward_gradient(*, samples: int = 1) -> Method:
    """Forward gradients with noise on activities: ȳ ≈ (∇L · u) u, and W̄ = xᵀ ȳ; E W̄ = ∇L.

    u is normal noise on every product of data with a weight, y = x W + u, and on parameters that
    are in no such product, or in one in a loop or a branch: all of them at once. There are fewer
    activities than weights where the batch is small, and then the variance is less.

    | stored | a random key |
    |---|---|
    | cost | two to three times the loss, and a product xᵀ ȳ per weight; x is kept for it |

    Source: Ren, Kornblith, Liao, Hinton 2023 (Scaling forward gradient with local losses, arXiv
    2210.03310), without their local losses.

    Args:
      samples: how many u the direction is the average of, one after the other.

    Raises:
      ValueError: less than one sample; a weight that is not known as such.

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

    def value_and_direction(loss, has_aux, options, params, args, memory):
        check_real(params)
        loss, leaves = traced(loss, params, args), [*map(jnp.asarray, tree_leaves(params))]
        numbers = range(len(leaves))
        uses = {repr(use.place): use for use in uses_of(loss, params, numbers)}
        inner = {i for u in uses.values() if LOOP in u.place or BRANCH in u.place for i in u.leaves}
        uses = {p: u for p, u in uses.items() if not inner & u.leaves}
        outer = {i for use in uses.values() for i in use.leaves}

        def one(key):
            shapes = [*(u.y for u in uses.values()),
                      *(x for i, x in enumerate(leaves) if i not in outer)]
            draws = [jax.random.normal(k, s.shape, s.dtype)
                     for k, s in zip(jax.random.split(key, max(len(shapes), 1)), shapes)]
            on_results = dict(zip(uses, draws))
            on_leaves = dict(zip((i for i in numbers if i not in outer), draws[len(uses):]))
            found, slope = _slope(loss, leaves, on_results, on_leaves, has_aux)
            moved = times(slope, on_leaves)
            moved |= _weights(loss, leaves, outer, times(slope, on_results), options)
            return found, tree_unflatten(loss.tree, [moved[i] for i in numbers])

        return averaged(one, memory, samples)

    return Method(start, value_and_direction)


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
                still = [*map(lax.stop_gradient, arrays)]
                still[at] = arrays[at]
                sums.append(jnp.sum(jc.bind(eqn, still)[0] * cotangents[repr(place)]))
            return jc.bind(eqn, arrays)

        loss.result(whole, product, dict(enumerate(whole)), True)
        return sum((s.astype(float) for s in sums), jnp.zeros((), float))

    return grad(linear, **options)({i: leaves[i] for i in outer})
