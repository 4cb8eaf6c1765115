"""Products with the Hessian and the Gauss-Newton matrix, and what products alone tell of them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from fbprop.reverse import grad, vjp


def hessian_vector(loss: Callable, *, rules=None) -> Callable:
    """The Hessian of a loss times a vector: the derivative of the gradient along it.

    Args:
      loss: ``(params, *batch) -> scalar``.
      rules: the table of rules; they need forward mode.

    Returns:
      A function ``(params, vector, *batch)``, ``vector`` and result like the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop.watch import curvature
      >>> product = curvature.hessian_vector(lambda w: jnp.sum(w ** 3))
      >>> product(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])).tolist()
      [6.0, 12.0]
    """
    def product(params, vector, *batch):
        gradient = lambda params: grad(loss, rules=rules)(params, *batch)
        return jax.jvp(gradient, (params,), (vector,))[1]

    return product


def ggn_vector(network: Callable, loss: Callable, *, rules=None) -> Callable:
    """The Gauss-Newton matrix JᵀHJ times a vector: forward through the network, and back.

    Args:
      network: ``(params, inputs) -> outputs``; loss: ``(outputs, *targets) -> scalar``.

    Returns:
      A function ``(params, vector, inputs, *targets)``, ``vector`` and result like the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop.watch import curvature
      >>> product = curvature.ggn_vector(lambda w, x: x * w, lambda y: jnp.sum(y ** 2))
      >>> product(jnp.ones(2), jnp.ones(2), jnp.array([1.0, 2.0])).tolist()
      [2.0, 8.0]
    """
    def product(params, vector, inputs, *targets):
        of_params = lambda params: network(params, inputs)
        outputs, tangent = jax.jvp(of_params, (params,), (vector,))
        curved = hessian_vector(loss, rules=rules)(outputs, tangent, *targets)
        return vjp(of_params, params, rules=rules)[1](curved)[0]

    return product


def hutchinson(product: Callable, like, key, samples: int = 32):
    """Diagonal and trace of a symmetric matrix, from its products with random signs.

    Unbiased: E z ⊙ Mz (Bekas et al. 2007) and E zᵀMz (Hutchinson 1989).

    Args:
      product: vector -> matrix times vector, pytrees like ``like``.
      key: for the signs; samples: products.

    Returns:
      ``(diagonal, trace)``.

    Raises:
      ValueError: there are no samples.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop.watch import curvature
      >>> d, t = curvature.hutchinson(lambda v: 2 * v, jnp.ones(3), jax.random.key(0), samples=2)
      >>> d.tolist(), float(t)
      ([2.0, 2.0, 2.0], 6.0)
    """
    if samples < 1:
        raise ValueError(f"An average is of one sample or more, got samples={samples}.")
    flat, unflat = ravel_pytree(like)

    def add(total, key):
        signs = jax.random.rademacher(key, flat.shape, flat.dtype)
        return total + signs * ravel_pytree(product(unflat(signs)))[0], None

    total, _ = lax.scan(add, jnp.zeros_like(flat), jax.random.split(key, samples))
    return unflat(total / samples), jnp.sum(total) / samples


def top_eigenvalue(product: Callable, like, key, steps: int = 20):
    """The largest eigenvalue of a symmetric matrix, by Lanczos' iteration from a random vector.

    Every new vector is made orthogonal to all before, so that none is found twice; the value is
    never too large but for rounding.

    Args:
      product: vector -> matrix times vector, pytrees like ``like``; steps: at most how many
        products, kept all: steps times the memory of a vector.

    Returns:
      A scalar.

    Raises:
      ValueError: there are no steps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop.watch import curvature
      >>> scale = jnp.array([1.0, 3.0])
      >>> value = curvature.top_eigenvalue(lambda v: scale * v, jnp.ones(2), jax.random.key(0))
      >>> round(float(value), 4)
      3.0
    """
    if steps < 1:
        raise ValueError(f"Lanczos' iteration takes one step or more, got steps={steps}.")
    flat, unflat = ravel_pytree(like)
    steps = min(steps, flat.size)
    start = jax.random.normal(key, flat.shape, flat.dtype)
    basis = jnp.zeros((steps, flat.size), flat.dtype).at[0].set(start / jnp.linalg.norm(start))

    def step(basis, i):
        image = ravel_pytree(product(unflat(basis[i])))[0]
        row = basis @ image
        rest = image - row @ basis
        rest = rest - (basis @ rest) @ basis
        length = jnp.linalg.norm(rest)
        found = length > 10 * jnp.finfo(flat.dtype).eps * jnp.linalg.norm(image)
        following = jnp.where(found, rest / jnp.where(found, length, 1), 0)
        return basis.at[i + 1].set(following, mode="drop"), row

    basis, rows = lax.scan(step, basis, jnp.arange(steps))
    # A row knows the vectors up to its own. Once the space is exhausted they are 0, and would give
    # the eigenvalue 0, were their rows not put out of the way.
    lower = jnp.tril(rows)
    real = jnp.sum(basis**2, 1) > 0.5
    lowest = jnp.diag(jnp.full(steps, -jnp.sum(jnp.abs(rows)) - 1))
    matrix = lower + lower.T - jnp.diag(jnp.diagonal(rows))
    return jnp.linalg.eigvalsh(jnp.where(real[:, None] & real, matrix, lowest))[-1]
