"""Networks that settle: predictive coding and equilibrium propagation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_map

from fbprop.learning.layered import activities, check_layers, halves, layered
from fbprop.learning.method import Method
from fbprop.reverse import grad


def predictive_coding(layers: Sequence[Callable], criterion: Callable, *, steps: int = 20,
                      rate: float = 0.1, strength: float = 1.0,
                      split: Callable | None = None) -> Method:
    """Layers' activities settle between prediction and target, and weights learn what is left over.

    Energy E = Σ_l ½ ‖h_l − f_l(h_{l−1})‖² + β criterion(f_L(h_{L−1}), y). From the forward pass on,
    in every step h ← h − η ∂E/∂h, all layers at once; then d = ∂E/∂W / β. In the limit of small β
    (a weak target) and many steps d is the gradient: the errors h − f(h) come to be −β ∂L/∂h.

    | stored | nothing |
    |---|---|
    | cost | (steps + 1) times a forward and a backward pass of each layer, none of them in turn |

    Source: Whittington and Bogacz 2017 (Neural Computation 29:1229); Rao and Ballard 1999.

    Args:
      layers, criterion, split: as for `greedy`. The criterion is a mean over examples; the sum over
        l is too.
      steps, rate: of settling, η in units of one example's energy.
      strength: β.

    Raises:
      TypeError: layers are no list of functions.   ValueError: parameters are none of these layers;
        fewer than one step, or a rate or strength that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> layers = [lambda p, h: jnp.tanh(h @ p), lambda p, h: h @ p]
      >>> criterion = lambda z, y: jnp.mean((z - y) ** 2)
      >>> def loss(params, x, y):
      ...     return criterion(layers[1](params[1], layers[0](params[0], x)), y)
      >>> method = learning.predictive_coding(layers, criterion, steps=200, strength=1e-3)
      >>> params = [0.3 * jnp.ones((3, 4)), 0.2 * jnp.ones((4, 2))]
      >>> x, y = jnp.ones((5, 3)), jnp.ones((5, 2))
      >>> memory = method.init(jax.random.key(0), loss, params, x, y)
      >>> found = learning.alignment(method, loss)(params, x, y, memory=memory)
      >>> bool(found.total > 0.999)
      True
    """
    layers = check_layers(layers)
    _check_settling(steps, rate, strength)

    def energy(params, hidden, x, y):
        below, total = x, 0.0
        for layer, p, h in zip(layers, params, hidden):
            total = total + jnp.sum(jnp.square(h - layer(p, below))) / (2 * x.shape[0])
            below = h
        out = criterion(layers[-1](params[-1], below), y)
        return total + jnp.asarray(strength, out.dtype) * out

    def direction(params, x, y, memory, options):
        hidden = activities(layers, params, x)[1:-1]
        slope = lambda h: grad(energy, 1, **options)(params, h, x, y)
        hidden = _settled(slope, hidden, steps, rate * x.shape[0])
        found = grad(energy, **options)(params, hidden, x, y)
        return tree_map(lambda d: d / jnp.asarray(strength, d.dtype), found), memory

    return layered(layers, lambda key, params, x, y: (), direction, split)


def equilibrium_propagation(energy: Callable, cost: Callable, states: Callable, *,
                            strength: float = 0.1, steps: tuple[int, int] = (100, 20),
                            rate: float = 0.1, split: Callable | None = None) -> Method:
    """Contrast of a network at rest and one that is nudged to its target.

    States s settle by s ← s − η ∂E/∂s to s⁰, and from there, with E + β C and with E − β C, to s⁺
    and s⁻;  d = (∂E/∂W(s⁺) − ∂E/∂W(s⁻)) / 2β. For small β, and once all are at rest, that is the
    gradient of C at s⁰ (with an error of β², in this symmetric form).

    | stored | nothing |
    |---|---|
    | cost | steps[0] + 2 steps[1] gradients of the energy with respect to states; no memory |

    Source: Scellier and Bengio 2017 (Frontiers in Computational Neuroscience 11:24); nudging both
    ways: Laborieux et al. 2021.

    Args:
      energy: ``(params, s, x) -> scalar``, summed over examples.
      cost: ``(s, y) -> scalar``, a mean over examples.
      states: ``x -> s``, where settling begins, a pytree.
      strength: β, in units of one example's cost.
      steps: at rest, nudged; rate: η.
      split: as for `greedy`.

    Raises:
      ValueError: fewer than one step, or a rate or strength that is not positive.

    Example: a Hopfield network of one layer; `settle` is what it computes.
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> energy = lambda w, s, x: jnp.sum(0.5 * s ** 2 - s * jnp.tanh(x @ w))
      >>> cost = lambda s, y: jnp.mean(jnp.sum((s - y) ** 2, -1))
      >>> states = lambda x: jnp.zeros((len(x), 2))
      >>> def loss(w, x, y):
      ...     return cost(learning.settle(energy, w, states(x), x), y)
      >>> method = learning.equilibrium_propagation(energy, cost, states)
      >>> w, x, y = 0.1 * jnp.ones((3, 2)), jnp.ones((5, 3)), jnp.ones((5, 2))
      >>> found = learning.alignment(method, loss)(w, x, y, memory=())
      >>> round(float(found.cosine), 3)
      1.0
    """
    _check_settling(min(steps), rate, strength)
    split = halves if split is None else split

    def value_and_direction(loss, has_aux, options, params, args, memory):
        x, y = split(*args)
        rest = settle(energy, params, states(x), x, steps=steps[0], rate=rate, **options)

        def contrast(sign):
            beta = sign * strength * x.shape[0]

            def nudged(s):
                c = cost(s, y)
                return energy(params, s, x) + jnp.asarray(beta, c.dtype) * c

            s = _settled(grad(nudged, **options), rest, steps[1], rate)
            return grad(energy, **options)(params, s, x)

        found = tree_map(
            lambda up, down: (up - down) / jnp.asarray(2 * strength * x.shape[0], up.dtype),
            contrast(1), contrast(-1),
        )
        return (loss(params, *args), found), memory

    return Method(lambda key, loss, params, *args: (), value_and_direction)


def settle(energy: Callable, params, s, x, *, steps: int = 100, rate: float = 0.1,
           **options) -> Any:
    """States after gradient descent on the energy: what an energy-based network computes.

    Args:
      energy: ``(params, s, x) -> scalar``; s: the first states.
      steps, rate: of descent.
      **options: of `fbprop.grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import learning
      >>> s = learning.settle(lambda w, s, x: (s - w * x) ** 2, 2.0, jnp.zeros(()), 3.0)
      >>> round(float(s), 4)
      6.0
    """
    _check_settling(steps, rate, 1)
    return _settled(lambda s: grad(energy, 1, **options)(params, s, x), s, steps, rate)


def _settled(slope, s, steps, rate):
    def one(s, _):
        return tree_map(lambda s, d: s - jnp.asarray(rate, s.dtype) * d, s, slope(s)), None

    return lax.scan(one, s, length=steps)[0]


def _check_settling(steps, rate, strength):
    if steps < 1 or not rate > 0 or not strength > 0:
        raise ValueError(
            f"States settle in steps of some size, got steps={steps}, rate={rate}, "
            f"strength={strength} expected at least one step, and rate and strength above 0."
        )
