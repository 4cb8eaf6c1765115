"""Losses of single layers: greedy layer-wise learning with auxiliary heads, and forward-forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_map

from fbprop.learning.layered import activities, check_layers, layered
from fbprop.learning.method import Method
from fbprop.reverse import grad


def greedy(layers: Sequence[Callable], criterion: Callable, outputs: int, *, rate: float = 0.1,
           split: Callable | None = None) -> Method:
    """Every layer learns its own classifier's loss, and nothing passes between layers.

    Of layer l, with its input h as it is and an auxiliary linear head on its result,
    d_l = ∇ criterion(f_l(h) V_l + c_l, y); the head learns by V ← V − η V̄ at the same time. The
    last layer's result is judged itself. Layers are learned side by side, as in the parallel form
    of the paper.

    | stored | of each layer but the last | head V [features of f_l, outputs], c [outputs] |
    |---|---|---|
    | cost | about backpropagation's, and the heads; values are kept for one layer at a time | |

    Source: Belilovsky, Eickenberg, Oyallon 2019, 2020 (arXiv 1812.11446, 1901.08164), whose heads
    have convolutions too.

    Args:
      layers: functions ``(params, h) -> h``, h [B, ...]; parameters are a list with a part of each.
      criterion: ``(outputs, y) -> scalar``, a mean over examples.
      outputs: how many a head has, as the last layer.
      rate: η.
      split: ``*args -> (x, y)`` from the loss's arguments; None: its first two, or the two parts of
        the first.

    Raises:
      TypeError: layers are no list of functions.   ValueError: parameters are none of these layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning, nn
      >>> layers = [lambda p, h: jnp.tanh(h @ p), lambda p, h: h @ p]
      >>> def loss(params, x, y):
      ...     return jnp.mean((layers[1](params[1], layers[0](params[0], x)) - y) ** 2)
      >>> method = learning.greedy(layers, lambda z, y: jnp.mean((z - y) ** 2), 2)
      >>> params, x, y = [jnp.ones((3, 4)), jnp.ones((4, 2))], jnp.ones((5, 3)), jnp.ones((5, 2))
      >>> memory = method.init(jax.random.key(0), loss, params, x, y)
      >>> (value, direction), memory = method.value_and_grad(loss)(params, x, y, memory=memory)
      >>> [d.shape for d in direction], len(memory)
      ([(3, 4), (4, 2)], 1)
    """
    layers = check_layers(layers)

    def init(key, params, x, y):
        shapes = jax.eval_shape(lambda p, x: activities(layers, p, x)[1:-1], params, x)
        keys = jax.random.split(key, len(layers))
        return [_head(k, h, outputs) for k, h in zip(keys, shapes)]

    def direction(params, x, y, memory, options):
        h, found, heads = x, [], []
        for i, layer in enumerate(layers):
            inside = lambda p, head, h=h, layer=layer: criterion(_judged(head, layer(p, h)), y)
            head = memory[i] if i < len(memory) else ()
            d, moved = grad(inside, (0, 1), **options)(params[i], head)
            found.append(d)
            heads.append(tree_map(lambda v, g: v - jnp.asarray(rate, v.dtype) * g, head, moved))
            h = lax.stop_gradient(layer(params[i], h))
        return found, heads[: len(memory)]

    return layered(layers, init, direction, split)


def _head(key, h, outputs):
    n = h.size // h.shape[0]
    v = jax.random.normal(key, (n, outputs), h.dtype) / jnp.sqrt(jnp.asarray(n, h.dtype))
    return {"kernel": v, "bias": jnp.zeros(outputs, h.dtype)}


def _judged(head, h):
    """A head's outputs; of no head, h itself."""
    return h.reshape(h.shape[0], -1) @ head["kernel"] + head["bias"] if head else h


def forward_forward(layers: Sequence[Callable], classes: int, *, threshold: float = 1.0,
                    split: Callable | None = None) -> Method:
    """Two forward passes, of right and of wrong data: layers learn to be active for the right ones.

    A label is part of the input: the first ``classes`` numbers of x are its one-hot form. Positive
    data have the right label, negative ones another, drawn anew. Of each layer of n cells, with
    goodness G = Σ h² per example, its input scaled to a mean square of 1 and as it is,

    d_l = ∇ mean(softplus(θ n − G⁺) + softplus(G⁻ − θ n)).

    | stored | a random key |
    |---|---|
    | cost | two forward passes and the weights' products; values are kept for one layer at a time |

    Source: Hinton 2022 (The forward-forward algorithm, arXiv 2212.13345).

    Args:
      layers: functions ``(params, h) -> h``, h [B, D]; parameters are a list with a part of each.
        None of them is an output: `forward_forward_scores` classifies.
      classes: how many labels there are.
      threshold: θ.
      split: as for `greedy`; y are integers [B].

    Raises:
      TypeError: layers are no list of functions.   ValueError: parameters are none of these layers,
        or inputs are narrower than the labels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> layers = [lambda p, h: jax.nn.relu(h @ p)] * 2
      >>> params, x, y = [jnp.ones((6, 4)), jnp.ones((4, 4))], jnp.ones((5, 6)), jnp.arange(5) % 3
      >>> method = learning.forward_forward(layers, 3)
      >>> def loss(params, x, y):
      ...     scores = learning.forward_forward_scores(layers, params, x, 3)
      ...     return jnp.mean(jnp.argmax(scores, -1) != y)
      >>> memory = method.init(jax.random.key(0), loss, params, x, y)
      >>> (error, direction), memory = method.value_and_grad(loss)(params, x, y, memory=memory)
      >>> [d.shape for d in direction]
      [(6, 4), (4, 4)]
    """
    layers = check_layers(layers)

    def direction(params, x, y, memory, options):
        key, now = jax.random.split(memory)
        wrong = (y + jax.random.randint(now, y.shape, 1, classes, y.dtype)) % classes
        pair, found = [labelled(x, label, classes) for label in (y, wrong)], []
        for layer, p in zip(layers, params):
            pair = [lax.stop_gradient(scaled(h)) for h in pair]

            def inside(p, pair=pair, layer=layer):
                outs = [layer(p, h) for h in pair]
                good, bad = (jnp.sum(jnp.square(h), -1) for h in outs)
                theta = jnp.asarray(threshold * outs[0].shape[-1], good.dtype)
                return jnp.mean(jax.nn.softplus(theta - good) + jax.nn.softplus(bad - theta))

            found.append(grad(inside, **options)(p))
            pair = [layer(p, h) for h in pair]
        return found, key

    return layered(layers, lambda key, params, x, y: jnp.copy(key), direction, split)


def forward_forward_scores(layers: Sequence[Callable], params, x, classes: int) -> jax.Array:
    """The goodness per cell of every label, [B, classes], of all layers but the first of several.

    Args:
      layers, classes: as for `forward_forward`; params: a list; x: [B, D], its first ``classes``
        numbers are not read.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> layers, params = [lambda p, h: jax.nn.relu(h @ p)], [jnp.eye(3)]
      >>> learning.forward_forward_scores(layers, params, jnp.zeros((2, 3)), 3).shape
      (2, 3)
    """
    def of_label(label):
        h, total = labelled(x, jnp.full(x.shape[:1], label), classes), jnp.zeros(len(x), x.dtype)
        for i, (layer, p) in enumerate(zip(layers, params)):
            h = layer(p, scaled(h))
            if i or len(layers) == 1:
                total = total + jnp.mean(jnp.square(h), -1)
        return total

    return lax.map(of_label, jnp.arange(classes)).T


def labelled(x, y, classes):
    """x [B, D] with the one-hot form of y in its first numbers."""
    if x.ndim != 2 or x.shape[1] < classes:
        raise ValueError(
            f"Labels stand in an input's first numbers, got inputs {list(x.shape)} expected "
            f"[B, D] with D >= classes={classes}: flatten images."
        )
    return jnp.concatenate([jax.nn.one_hot(y, classes, dtype=x.dtype), x[:, classes:]], 1)


def scaled(h):
    """h with a mean square of 1 per example, so that its direction alone is seen above."""
    size = jnp.sqrt(jnp.mean(jnp.square(h), -1, keepdims=True))
    return h / (size + jnp.asarray(1e-4, h.dtype))
