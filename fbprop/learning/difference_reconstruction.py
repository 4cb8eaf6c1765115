"""Target propagation whose feedback learns what differences of the output mean for a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import tree_map

from fbprop.learning.layered import activities, check_layers, layered
from fbprop.learning.method import Method
from fbprop.learning.target_propagation import check_step, decoded, inverse
from fbprop.reverse import grad


def difference_reconstruction(
    layers: Sequence[Callable], criterion: Callable, *, direct: bool = True, step: float = 0.1,
    rate: float = 0.01, noise: float = 0.1, damping: float = 0.1,
    activation: Callable = jnp.tanh, split: Callable | None = None,
) -> Method:
    """Targets whose feedback learns to carry differences of the output: damped Gauss-Newton ones.

    ĥ_L = h_L − α ∂criterion/∂h_L. Direct feedback (DDTP-linear) sends that straight to each layer,
    ĥ_l = h_l + (ĥ_L − h_L) V_l;  in a chain (DTP-DRL) it goes as in difference target propagation,
    ĥ_l = h_l + g_l(ĥ_{l+1}) − g_l(h_{l+1}) with g_l(h) = φ(h V_l + c_l). Weights learn
    d_l = ∇ ½ ‖f_l(h_{l−1}) − ĥ_l‖² / α, the last layer the criterion's own gradient.

    With t_l(u) the target that an output u would send to layer l, and F_l all layers above it, the
    feedback of l alone learns the difference reconstruction loss, by gradient descent:

    R_l = (‖t_l(F_l(h_l + σε)) − (h_l + σε)‖² + λ ‖t_l(h_L + σε') − h_l‖²) / σ².

    Where J is the derivative of F_l and the feedback is linear, its least value for small σ is at
    V_l = (JJᵀ + λ)⁻¹ J: targets are those of damped Gauss-Newton, also of layers without an
    inverse, in which `difference_target_propagation` has an error that its own loss does not see.

    | stored | of each layer but the last | V, in a chain also c; a random key |
    |---|---|---|
    | cost | each layer's noise passes all layers above, L² / 2 layers forward for L | |

    Source: Meulemans, Carzaniga, Suykens, Sacramento, Grewe 2020 (A theoretical framework for
    target propagation, arXiv 2006.14331).

    Args:
      layers, criterion, split: as for `greedy`.
      direct: whether feedback is straight from the output.
      step: α, in units of one example's criterion.
      rate: of the feedback's learning.
      noise: σ; damping: λ.
      activation: φ, of a chain: one that reaches the layers' values, as tanh those of rectifiers
        does not: an MLP on Fashion-MNIST comes to 0.779 on test images, with φ(h) = h to 0.856.

    Raises:
      TypeError: layers are no list of functions.   ValueError: parameters are none of these layers;
        a step or noise that is not positive, or a negative damping.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> layers = [lambda p, h: jnp.tanh(h @ p)] * 2 + [lambda p, h: h @ p]
      >>> criterion = lambda z, y: jnp.mean((z - y) ** 2)
      >>> def loss(params, x, y):
      ...     for layer, p in zip(layers, params):
      ...         x = layer(p, x)
      ...     return criterion(x, y)
      >>> method = learning.difference_reconstruction(layers, criterion)
      >>> params = [jnp.ones((3, 4)), jnp.ones((4, 4)), jnp.ones((4, 2))]
      >>> x, y = jnp.ones((5, 3)), jnp.ones((5, 2))
      >>> memory = method.init(jax.random.key(0), loss, params, x, y)
      >>> [v["kernel"].shape for v in memory["feedback"]]
      [(2, 4), (2, 4)]
    """
    layers = check_layers(layers)
    check_step(step)
    if not noise > 0 or not damping >= 0:
        raise ValueError(
            f"Feedback learns from noise of some size, got noise={noise}, damping={damping} "
            "expected noise above 0, and damping of at least 0."
        )
    sent = _straight if direct else _in_turn(activation)

    def init(key, params, x, y):
        h = jax.eval_shape(lambda p, x: activities(layers, p, x), params, x)[1:]
        keys = jax.random.split(key, len(layers) + 1)
        feedback = [inverse(k, h[-1] if direct else above, below)
                    for k, below, above in zip(keys, h, h[1:])]
        if direct:
            feedback = [{"kernel": v["kernel"]} for v in feedback]
        return {"feedback": feedback, "key": keys[-1]}

    def direction(params, x, y, memory, options):
        h, n, feedback = activities(layers, params, x), x.shape[0], memory["feedback"]
        key, *keys = jax.random.split(memory["key"], len(layers) + 1)
        last = lambda p, h: criterion(layers[-1](p, h), y)
        slope = grad(lambda out: criterion(out, y), **options)(h[-1])
        targets = sent(feedback, h, h[-1] - jnp.asarray(step * n, slope.dtype) * slope, 0)
        found = []
        for i, target in enumerate(targets):
            def local(p, i=i, target=target):
                off = jnp.sum(jnp.square(layers[i](p, h[i]) - target))
                return off / jnp.asarray(2 * step * n, off.dtype)

            found.append(grad(local, **options)(params[i]))
        found.append(grad(last, **options)(params[-1], h[-2]))
        taught = [_taught(i, k, params, h, feedback, options) for i, k in enumerate(keys[:-1])]
        return found, {"feedback": taught, "key": key}

    def _taught(i, key, params, h, feedback, options):
        """The feedback of layer i, of result h[i + 1], after a step on its R."""
        here, (one, other) = h[i + 1], jax.random.split(key)
        near, moved = (h + jnp.asarray(noise, h.dtype) * jax.random.normal(k, h.shape, h.dtype)
                       for k, h in ((one, here), (other, h[-1])))
        above = activities(layers[i + 1 :], params[i + 1 :], near)[-1]

        def lost(mine):
            whole = [*feedback[:i], mine, *feedback[i + 1 :]]
            back, stray = (sent(whole, h, u, i)[0] for u in (above, moved))
            off = jnp.sum(jnp.square(back - near))
            off = off + jnp.asarray(damping, off.dtype) * jnp.sum(jnp.square(stray - here))
            return off / jnp.asarray(noise**2 * here.shape[0], off.dtype)

        found = grad(lost, **options)(feedback[i])
        return tree_map(lambda v, d: v - jnp.asarray(rate, v.dtype) * d, feedback[i], found)

    return layered(layers, init, direction, split)


def _straight(feedback, h, out, first):
    """Targets of the results of layers from the first on, but the last's, for an output."""
    off = (out - h[-1]).reshape(out.shape[0], -1)
    return [here + (off @ v["kernel"]).reshape(here.shape)
            for v, here in zip(feedback[first:], h[first + 1 : -1])]


def _in_turn(activation):
    def sent(feedback, h, out, first):
        targets = [out]
        for i in reversed(range(first, len(feedback))):
            here, above = h[i + 1], h[i + 2]
            up, was = (decoded(activation, feedback[i], u, here) for u in (targets[0], above))
            targets.insert(0, here + up - was)
        return targets[:-1]

    return sent
