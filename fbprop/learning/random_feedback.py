"""Feedback weights that do not learn: random ones, and ones with the weight's signs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fbprop.learning.feedback import Feedback

FORMS = ("uniform", "batch_random", "fixed_random")


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

    | stored | of each weight but the first layer's | B, of its shape |
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
      >>> {path: b.shape for path, b in memory.items()}
      {'b': (4, 1)}
      >>> (value, direction), memory = method.value_and_grad(loss)(params, x, memory=memory)
      >>> direction["a"].shape
      (3, 4)
    """
    return Feedback(lambda key, w: drawn(key, w, scale), lambda b, w: (b, b))


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
      >>> loss = lambda p, x: jnp.mean((x + p["bias"]) @ p["w"])
      >>> params, x = {"bias": jnp.zeros(3), "w": -2 * jnp.ones((3, 1))}, jnp.ones((2, 3))
      >>> memory = learning.sign_symmetry("uniform").init(jax.random.key(0), loss, params, x)
      >>> {path: float(size) for path, size in memory.items()}
      {'w': 2.0}
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
