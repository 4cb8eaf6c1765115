"""Learning rules without a way back: the loss is looked at where parameters are disturbed."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_flatten, tree_map, tree_unflatten

from fbprop.core.arguments import check_input
from fbprop.learning.method import Method


def forward_gradient(*, samples: int = 1) -> Method:
    """A directional derivative times its direction: d = (∇L · v) v, v normal; E d = ∇L.

    By forward mode, in one pass with the loss itself; nothing is kept for a way back. The variance
    grows with the number of parameters.

    | stored | a random key |
    |---|---|
    | cost | two to three times the loss per sample, backpropagation's about three; memory for v |

    Source: Baydin et al. 2022 (Gradients without backpropagation, arXiv 2202.08587).

    Args:
      samples: how many v the direction is the average of, one after the other.

    Raises:
      ValueError: less than one sample.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> method, loss, w = learning.forward_gradient(), lambda w: 3 * w, jnp.float32(1)
      >>> memory = method.init(jax.random.key(0), loss, w)
      >>> (value, direction), memory = method.value_and_grad(loss)(w, memory=memory)
      >>> float(value), bool(direction >= 0)
      (3.0, True)
    """
    check_samples(samples)

    def value_and_direction(loss, has_aux, options, params, args, memory):
        check_real(params)

        def one(key):
            v = noise(key, params)
            of_params = lambda p: loss(p, *args)
            value, slope, *aux = jax.jvp(of_params, (params,), (v,), has_aux=has_aux)
            return (value, *aux) if has_aux else value, times(slope, v)

        return averaged(one, memory, samples)

    return Method(start, value_and_direction)


def evolution_strategy(
    sigma: float = 0.01, *, samples: int = 16, rank: int | None = None
) -> Method:
    """Differences of the loss between opposite disturbances: d = Σ (L(θ + σε) − L(θ − σε)) ε / 2nσ.

    The gradient of the loss averaged over normal disturbances of size σ, without any derivative; so
    the loss may be a step function. Pairs of opposite signs cancel all even terms.

    | stored | a random key |
    |---|---|
    | cost | 2 n + 1 times the loss; no memory but for the noise, of rank r (m + n) r a matrix |

    Source: Salimans et al. 2017 (arXiv 1703.03864); noise of low rank, ε = A Bᵀ / √r with normal A
    and B, whose elements are of variance 1 and uncorrelated: Sarkar et al. 2025 (arXiv 2511.16652).

    Args:
      sigma: σ.
      samples: pairs n, one after the other.
      rank: r of the noise of parameters with two or more dimensions, as matrices with the last of
        these as columns; None: all elements are independent.

    Raises:
      ValueError: σ or rank not positive, less than one pair.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import learning
      >>> method = learning.evolution_strategy(0.1, samples=1, rank=1)
      >>> loss, w = lambda w: jnp.sum(w), jnp.ones((3, 4))
      >>> memory = method.init(jax.random.key(0), loss, w)
      >>> (value, direction), memory = method.value_and_grad(loss)(w, memory=memory)
      >>> float(value), int(jnp.linalg.matrix_rank(direction))
      (12.0, 1)
    """
    check_samples(samples)
    if not sigma > 0 or not (rank is None or rank >= 1):
        raise ValueError(
            f"Disturbances have a size and a rank, got sigma={sigma}, rank={rank} expected sigma > "
            "0, and a rank of at least 1 or None."
        )

    def value_and_direction(loss, has_aux, options, params, args, memory):
        check_real(params)
        value_of = lambda p: loss(p, *args)[0] if has_aux else loss(p, *args)

        def one(key):
            e = noise(key, params, rank)
            up, down = (
                value_of(tree_map(lambda p, e: p + jnp.asarray(s, e.dtype) * e, params, e))
                for s in (sigma, -sigma)
            )
            return (), times((up - down) / jnp.asarray(2 * sigma, up.dtype), e)

        (_, direction), memory = averaged(one, memory, samples)
        return (loss(params, *args), direction), memory

    return Method(start, value_and_direction)


def start(key, loss: Callable, params, *args):
    """The memory of these rules: a copy of the key they draw from."""
    return jnp.copy(key)


def averaged(one: Callable, key, samples: int):
    """The first of the samples' values, the mean of their directions, and the key after them.

    ``one`` maps a key to ``(value, direction)``.
    """
    key, now = jax.random.split(key)
    first, *others = keys = jax.random.split(now, samples)
    value, total = one(first)
    if others:
        add = lambda total, key: (tree_map(jnp.add, total, one(key)[1]), None)
        total, _ = lax.scan(add, total, keys[1:])
    return (value, tree_map(lambda t: t / jnp.asarray(samples, t.dtype), total)), key


def noise(key, params, rank: int | None = None):
    """Normal numbers like the parameters, matrices of this rank."""
    leaves, tree = tree_flatten(params)

    def one(key, x):
        x = jnp.asarray(x)
        if rank is None or x.ndim < 2:
            return jax.random.normal(key, x.shape, x.dtype)
        rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
        a, b = (jax.random.normal(k, (n, rank), x.dtype)
                for k, n in zip(jax.random.split(key), (rows, columns)))
        return (a @ b.T).reshape(x.shape) / jnp.sqrt(jnp.asarray(rank, x.dtype))

    return tree_unflatten(tree, [*map(one, jax.random.split(key, max(len(leaves), 1)), leaves)])


def times(number, tree):
    return tree_map(lambda x: number.astype(x.dtype) * x, tree)


def check_samples(samples):
    if samples < 1:
        raise ValueError(f"An average is of one sample or more, got samples={samples}.")


def check_real(params):
    for x in jax.tree.leaves(params):
        check_input(jnp.result_type(x), False, False)
