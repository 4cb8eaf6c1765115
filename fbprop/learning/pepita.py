"""PEPITA: a second forward pass, from an input that the first one's error has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_leaves, tree_unflatten

from fbprop.core import jaxcompat as jc
from fbprop.learning.layered import activities, check_layers, layered
from fbprop.learning.method import Method
from fbprop.learning.sweep import traced
from fbprop.reverse import grad


def pepita(layers: Sequence[Callable], criterion: Callable, *, scale: float = 0.05,
           split: Callable | None = None) -> Method:
    """Present the error to perturb the input to modulate activity.

    e = ∂criterion/∂outputs;  a second pass starts from x' = x + n e F. With a_l the input of layer
    l (a_0 = x, a_0' = x') and n examples,  W̄_l = a_l'ᵀ (a_{l+1} − a_{l+1}') / n, and of the last
    layer a_L'ᵀ e. No weight is read backward, and no layer waits for one above.
    Parameters that are no weights, such as biases, do not learn: the paper's networks have none.

    | stored | F [outputs, inputs] |
    |---|---|
    | cost | two forward passes and the weights' products; activities of the first pass are kept |

    Source: Dellaferrera and Kreiman 2022 (arXiv 2201.11665).

    Args:
      layers, criterion, split: as for `greedy`; each layer has one weighted product, whose result
        and the layer's have one shape (of a dense layer, with any activation).
      scale: F is uniform between ± scale √(6 / inputs), as in the paper.

    Raises:
      TypeError: layers are no list of functions.   ValueError: parameters are none of these layers,
        or a layer is not of that kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> layers = [lambda p, h: jnp.tanh(h @ p), lambda p, h: h @ p]
      >>> criterion = lambda z, y: jnp.mean((z - y) ** 2)
      >>> def loss(params, x, y):
      ...     return criterion(layers[1](params[1], layers[0](params[0], x)), y)
      >>> method = learning.pepita(layers, criterion)
      >>> params, x, y = [jnp.ones((3, 4)), jnp.ones((4, 2))], jnp.ones((5, 3)), jnp.ones((5, 2))
      >>> memory = method.init(jax.random.key(0), loss, params, x, y)
      >>> memory.shape
      (2, 3)
    """
    layers = check_layers(layers)

    def init(key, params, x, y):
        out = jax.eval_shape(lambda p, x: activities(layers, p, x)[-1], params, x)
        k, n = (h.size // h.shape[0] for h in (out, x))
        return jax.random.uniform(key, (k, n), x.dtype, -1, 1) * jnp.asarray(
            scale * (6 / n) ** 0.5, x.dtype
        )

    def direction(params, x, y, memory, options):
        first, n = activities(layers, params, x), x.shape[0]
        error = grad(lambda out: criterion(out, y), **options)(first[-1])
        pushed = n * error.reshape(n, -1).astype(x.dtype) @ memory
        second = activities(layers, params, x + pushed.reshape(x.shape))
        off = [(a - b) / n for a, b in zip(first[1:-1], second[1:-1])] + [error]
        found = [
            _outer(layer, p, h, d, i, options)
            for i, (layer, p, h, d) in enumerate(zip(layers, params, second, off))
        ]
        return found, memory

    return layered(layers, init, direction, split)


def _outer(layer, p, h, d, number, options):
    """W̄ = hᵀ d of a layer's one product; 0 of its other parameters."""
    loss, leaves, seen = traced(layer, p, (h,)), tree_leaves(p), []

    def paired(leaves):
        sums = []

        def product(eqn, values, at, place):
            arrays = [v.array for v in values]
            still = [*map(lax.stop_gradient, arrays)]
            still[at] = arrays[at]
            (y,) = jc.bind(eqn, still)
            seen.append(y.shape)
            if y.shape == d.shape:
                sums.append(jnp.sum(y * d.astype(y.dtype)))
            return jc.bind(eqn, arrays)

        loss.run(leaves, product, dict(enumerate(leaves)), every=True)
        return sum(sums, jnp.zeros((), d.dtype))

    found = grad(paired, **options)(leaves)
    if len(seen) != 1 or seen[0] != d.shape:
        raise ValueError(
            "A layer has one weighted product, of its result's shape, got products of "
            f"{[list(s) for s in seen]} in layer {number} expected one of {list(d.shape)}: put "
            "pooling and what else there is into the layer after it."
        )
    return tree_unflatten(loss.tree, found)
