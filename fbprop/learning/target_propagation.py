"""Difference target propagation: targets for activities, by learned inverses of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_map

from fbprop.learning.layered import activities, check_layers, layered
from fbprop.learning.method import Method
from fbprop.reverse import grad


def difference_target_propagation(
    layers: Sequence[Callable], criterion: Callable, *, step: float = 0.1, rate: float = 0.01,
    noise: float = 0.1, activation: Callable = jnp.tanh, split: Callable | None = None,
) -> Method:
    """Every layer has a target, found by a learned inverse of the layer above.

    ĥ_{L−1} = h_{L−1} − α ∂criterion/∂h_{L−1}, and below ĥ_{l−1} = h_{l−1} + g_l(ĥ_l) − g_l(h_l);
    then d_l = ∇ ½ ‖f_l(h_{l−1}) − ĥ_l‖² / α, and of the last layer the criterion's own. Inverses
    are g(h) = φ(h V + c), and learn ‖g_l(f_l(h + ε)) − (h + ε)‖² from noise ε by gradient descent.

    | stored | of each layer between the first and the last | V, c |
    |---|---|---|
    | cost | about twice backpropagation's, no way back but through one layer at a time | |

    Source: Lee, Zhang, Fischer, Bengio 2015 (arXiv 1412.7525).

    Args:
      layers, criterion, split: as for `greedy`.
      step: α, in units of one example's criterion.
      rate: of the inverses' learning.
      noise: standard deviation of ε.
      activation: φ.

    Raises:
      TypeError: layers are no list of functions.   ValueError: parameters are none of these layers;
        a step that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> layers = [lambda p, h: jnp.tanh(h @ p)] * 2 + [lambda p, h: h @ p]
      >>> criterion = lambda z, y: jnp.mean((z - y) ** 2)
      >>> def loss(params, x, y):
      ...     for layer, p in zip(layers, params):
      ...         x = layer(p, x)
      ...     return criterion(x, y)
      >>> method = learning.difference_target_propagation(layers, criterion)
      >>> params = [jnp.ones((3, 4)), jnp.ones((4, 4)), jnp.ones((4, 2))]
      >>> x, y = jnp.ones((5, 3)), jnp.ones((5, 2))
      >>> memory = method.init(jax.random.key(0), loss, params, x, y)
      >>> [g["kernel"].shape for g in memory["inverses"]]
      [(4, 4)]
    """
    layers = check_layers(layers)
    check_step(step)

    def init(key, params, x, y):
        h = jax.eval_shape(lambda p, x: activities(layers, p, x), params, x)[1:-1]
        keys = jax.random.split(key, len(layers) + 1)
        inverses = [inverse(k, above, below) for k, below, above in zip(keys, h, h[1:])]
        return {"inverses": inverses, "key": keys[-1]}

    def direction(params, x, y, memory, options):
        h, n = activities(layers, params, x), x.shape[0]
        key, *keys = jax.random.split(memory["key"], len(layers) + 1)
        last = lambda p, h: criterion(layers[-1](p, h), y)
        d_last, slope = grad(last, (0, 1), **options)(params[-1], h[-2])
        target = h[-2] - jnp.asarray(step * n, slope.dtype) * slope
        found, inverses = [d_last], []
        for i in reversed(range(len(layers) - 1)):
            def local(p, h=h[i], layer=layers[i], target=target):
                off = jnp.sum(jnp.square(layer(p, h) - target))
                return off / jnp.asarray(2 * step * n, off.dtype)

            found.append(grad(local, **options)(params[i]))
            if i:
                g = memory["inverses"][i - 1]
                up, was = (decoded(activation, g, u, h[i]) for u in (target, h[i + 1]))
                inverses.append(taught(g, keys[i], h[i], layers[i], params[i], options))
                target = h[i] + up - was
        return found[::-1], {"inverses": inverses[::-1], "key": key}

    def taught(g, key, h, layer, p, options):
        h = h + jnp.asarray(noise, h.dtype) * jax.random.normal(key, h.shape, h.dtype)
        above = lax.stop_gradient(layer(p, h))
        off = lambda g: jnp.sum(jnp.square(decoded(activation, g, above, h) - h)) / h.shape[0]
        moved = grad(off, **options)(g)
        return tree_map(lambda v, d: v - jnp.asarray(rate, v.dtype) * d, g, moved)

    return layered(layers, init, direction, split)


def check_step(step):
    if not step > 0:
        raise ValueError(f"Targets are a step away, got step={step} expected above 0, as 0.1.")


def decoded(activation, g, h, like):
    """g(h) = φ(h V + c), in the form of ``like``."""
    flat = activation(h.reshape(h.shape[0], -1) @ g["kernel"] + g["bias"])
    return flat.reshape(like.shape)


def inverse(key, above, below):
    """V and c, at first, of a way from one layer's result to another's."""
    n, m = (h.size // h.shape[0] for h in (above, below))
    v = jax.random.normal(key, (n, m), above.dtype) / jnp.sqrt(jnp.asarray(n, above.dtype))
    return {"kernel": v, "bias": jnp.zeros(m, above.dtype)}
