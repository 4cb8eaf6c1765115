"""Feedback weights that learn to be the weights' transposes, without reading them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fbprop.learning.feedback import Feedback
from fbprop.learning.random_feedback import drawn


def kolen_pollack(decay: float = 1e-3, *, scale: float = 1.0) -> Feedback:
    """Feedback that learns to be the transpose: B gets W's updates, and both decay alike.

    x̄ = ȳ Bᵀ;  after each step W ← (1 − λ) W + ΔW and B ← (1 − λ) B + ΔW, so that W − B shrinks by
    1 − λ each step: no weight is ever read for another. ΔW, of any optimiser, is a product of what
    stands at either end of a synapse, so both sides can compute it. A first layer has no B, and its
    weights do not decay.

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
      >>> loss = lambda p, x: jnp.mean((x + p["bias"]) @ p["w"])
      >>> params, x = {"bias": jnp.zeros(3), "w": jnp.ones((3, 1))}, jnp.ones((2, 3))
      >>> method = learning.kolen_pollack(0.5)
      >>> memory = method.init(jax.random.key(0), loss, params, x)
      >>> updates, new = method.update(jax.tree.map(jnp.zeros_like, params), params, memory)
      >>> updates["w"].ravel().tolist(), bool(jnp.all(new["w"] == memory["w"] / 2))
      ([-0.5, -0.5, -0.5], True)
    """
    check_decay(decay)

    def learn(b, w, update):
        rate = jnp.asarray(decay, b.dtype)
        return update - rate.astype(update.dtype) * w, b - rate * b + update.astype(b.dtype)

    return Feedback(lambda key, w: drawn(key, w, scale), lambda b, w: (b, b), learn)


def product_feedback(
    decay: float = 1e-3, *, expansion: float = 4.0, scale: float = 1.0
) -> Feedback:
    """Feedback through a population between: B = P R, of which P learns and R is fixed.

    Seen as matrices, W of [n, m]: x̄ = (ȳ Rᵀ) Pᵀ, R of [r, m] fixed, normal of variance 1/r, so that
    RᵀR ≈ 1; after each step W ← (1 − λ) W + ΔW and P ← (1 − λ) P + ΔW Rᵀ. P comes to be W Rᵀ, and
    P R to point as W does, though no weight on the way back is like one on the way forth.

    | stored | of each weight | P [n, r] and R [r, m], r = expansion · m |
    |---|---|---|
    | cost | as backpropagation, and two products n × r × m a step | |

    Source: Li, Kietzmann, Leibo et al. 2024 (product feedback alignment, arXiv 2405.20594).

    Args:
      decay: λ in [0, 1).
      expansion: how many times as many as m the cells between are; the angle between P R and W in
        the end is about that of tan² = 1/expansion.
      scale: of the first P R, as for `feedback_alignment`.

    Raises:
      ValueError: a decay outside [0, 1), or no cells between.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> loss = lambda p, x: jnp.mean((x + p["bias"]) @ p["w"])
      >>> params, x = {"bias": jnp.zeros(3), "w": jnp.ones((3, 2))}, jnp.ones((2, 3))
      >>> memory = learning.product_feedback().init(jax.random.key(0), loss, params, x)
      >>> memory["w"]["learned"].shape, memory["w"]["fixed"].shape
      ((3, 8), (8, 2))
    """
    check_decay(decay)
    if not expansion > 0:
        raise ValueError(
            f"Feedback goes through cells between, got expansion={expansion} expected more than 0."
        )

    def matrix(w):
        return w.reshape(-1, w.shape[-1]) if w.ndim else w.reshape(1, 1)

    def start(key, w):
        one, other = jax.random.split(key)
        n, m = matrix(w).shape
        r = max(math.ceil(expansion * m), 1)
        fixed = jax.random.normal(one, (r, m), w.dtype) / jnp.sqrt(jnp.asarray(r, w.dtype))
        size = jnp.sqrt(jnp.mean(jnp.square(drawn(other, w, scale)))) * jnp.asarray(
            math.sqrt(m / r), w.dtype)
        return {"fixed": fixed, "learned": size * jax.random.normal(other, (n, r), w.dtype)}

    def learn(state, w, update):
        rate = jnp.asarray(decay, w.dtype)
        moved = matrix(update).astype(w.dtype) @ state["fixed"].T
        learned = state["learned"] - rate * state["learned"] + moved
        return update - (rate * w).astype(update.dtype), state | {"learned": learned}

    def weight(state, w):
        return (state["learned"] @ state["fixed"]).reshape(w.shape), state

    return Feedback(start, weight, learn)


def weight_mirror(rate: float = 0.1, *, scale: float = 1.0) -> Feedback:
    """Feedback weights learned from noise: B ← (1 − η) B + η ξᵀ (ξ W), averaged over the batch.

    In every step each weighted product is also done with noise ξ in its input's place, normal of
    variance 1: what comes out correlates with what went in as W says, E ξᵀ(ξ W) = W, and B follows.
    In a loop the noise is the same at every step, and taps of a convolution that meet padding
    count for less.

    | stored | of each weight but the first layer's | B, of its shape, and a key |
    |---|---|---|
    | cost | as backpropagation, and per weight two products of the same size more | |

    Source: Akrout et al. 2019 (Deep learning without weight transport, arXiv 1904.05391), whose
    mirror phases are here in every step, with their decay equal to their rate.

    Args:
      rate: η in (0, 1]; the noise in B is about η of that of one batch.
      scale: of the first B, as for `feedback_alignment`.

    Raises:
      ValueError: a rate outside (0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> loss = lambda p, x: jnp.mean((x + p["bias"]) @ p["w"])
      >>> params, x = {"bias": jnp.zeros(3), "w": jnp.ones((3, 1))}, jnp.ones((1000, 3))
      >>> method = learning.weight_mirror(1.0)
      >>> memory = method.init(jax.random.key(0), loss, params, x)
      >>> _, memory = method.value_and_grad(loss)(params, x, memory=memory)
      >>> bool(jnp.all(jnp.abs(memory["w"]["b"] - 1) < 0.2))
      True
    """
    if not 0 < rate <= 1:
        raise ValueError(f"A mirror's rate is a share, got rate={rate} expected 0 < rate <= 1.")

    def start(key, w):
        return {"b": drawn(key, w, scale), "key": jax.random.fold_in(key, 1)}

    def reflect(state, seen):
        share = jnp.asarray(rate, seen.dtype)
        key = jax.random.split(state["key"])[0]
        return {"b": state["b"] + share * (seen - state["b"]), "key": key}

    return Feedback(start, lambda state, w: (state["b"], state), reflect=reflect)


def check_decay(decay):
    if not 0 <= decay < 1:
        raise ValueError(
            f"Weights and their feedback shrink by 1 − decay a step, got decay={decay} expected "
            "0 <= decay < 1: 1e-3 is usual."
        )
