"""The gradient checker: fbprop's cotangents against `jax.vjp` and against finite differences.

Every element of every operand is looked at. (`jax.test_util.check_grads` looks along one random
direction with tolerances that grow with size: a rule that is off by 2x in one element of 10,000
passes it.) All three are computed in float64, where two closed forms agree to about 4e-16 and
4-point central differences at h = 1e-4 are good to about 5e-11 (both relative to the largest
element).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten

from fbprop.core.fallback import jax_vjp
from fbprop.core.jaxcompat import differentiable
from fbprop.core.table import Table
from fbprop.reverse import vjp

RTOL_JAX = 1e-12
RTOL_DIFFERENCES = 1e-8
# 4-point central difference: f'(x) ≈ Σ w f(x + s h) / h, error O(h⁴) (Fornberg 1988, table 1).
STEPS, WEIGHTS, H = (-2, -1, 1, 2), (1 / 12, -2 / 3, 2 / 3, -1 / 12), 1e-4


class CheckFailed(AssertionError):
    """A cotangent differs from its reference; the message is the report."""


@dataclass(frozen=True)
class Row:
    """One operand against one reference.

    Attributes:
      operand: path of the operand among the primals.     against: "jax.vjp" or "differences".
      error: max |got − expected| / max |expected|.        tolerance: what it may be.
      index, got, expected: the element that differs most.
    """

    operand: str
    against: str
    error: float
    tolerance: float
    index: tuple[int, ...]
    got: complex
    expected: complex

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def __str__(self):
        line = (
            f"{'ok  ' if self.ok else 'FAIL'} {self.operand:<12} against {self.against:<11} "
            f"error {self.error:.1e} (allowed {self.tolerance:.0e})"
        )
        if self.ok:
            return line
        ratio = f", ratio {self.got / self.expected:.9g}" if self.expected else ""
        return (
            f"{line}; element {list(self.index)}: got {self.got:.12g} expected "
            f"{self.expected:.12g}{ratio}"
        )


@dataclass(frozen=True)
class Report:
    """The rows of one check; ``str`` of it is readable, ``ok`` says whether all rows hold."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self):
        return "\n".join(map(str, self.rows))


def check(fun: Callable, *primals, rules: Table | None = None, differences: bool = True,
          rtol_jax: float = RTOL_JAX, rtol_differences: float = RTOL_DIFFERENCES,
          seed: int = 0) -> Report:
    """Compare `fbprop.vjp` of a function with `jax.vjp` and finite differences, element by element.

    Args:
      fun: function of pytrees of arrays returning a pytree of arrays.
      *primals: where to check; floats are taken to float64, complex to complex128.
      rules: the table to check; default `fbprop.table`.
      differences: also compare with 4-point central differences (``fun`` must be smooth within
        2e-4 of the primals, and is evaluated 4 times per element, batched by `jax.vmap`).
      rtol_jax, rtol_differences: allowed max |got − expected| / max |expected| per operand.
      seed: of the random output cotangent.

    Returns:
      A `Report`, one row per differentiable operand leaf and reference.

    Raises:
      CheckFailed: a row does not hold; the message is the report.

    Example:
      >>> import fbprop, jax.numpy as jnp
      >>> fbprop.check(jnp.tanh, jnp.array([0.5, -1.0])).ok
      True
    """
    with jax.enable_x64(True):
        primals = tree_map(_widened, primals)
        out = jax.eval_shape(fun, *primals)
        cotangent = random_cotangent(out, seed)
        got = vjp(fun, *primals, rules=rules)[1](cotangent)
        expected = jax_vjp(fun, *primals)[1](cotangent)
        rows = compare(primals, got, expected, "jax.vjp", rtol_jax)
        if differences:
            expected = jax.jit(lambda *a: finite_differences(fun, *a))(primals, cotangent)
            rows += compare(primals, got, expected, "differences", rtol_differences)
    report = Report(tuple(rows))
    if not report.ok:
        raise CheckFailed(f"Cotangents agree with their references, got\n{report}")
    return report


def _widened(x):
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return x.astype(jnp.complex128)
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def random_cotangent(out, seed=0):
    """A cotangent of this output type: standard normal, float0 for integers and booleans."""
    rng = np.random.default_rng(seed)

    def leaf(aval):
        if not differentiable(aval):
            return np.zeros(aval.shape, jax.dtypes.float0)
        value = rng.standard_normal(aval.shape)
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            value = value + 1j * rng.standard_normal(aval.shape)
        return jax.device_put(value.astype(aval.dtype))

    return tree_map(leaf, out)


def compare(primals, got, expected, against, tolerance) -> list[Row]:
    """One row per differentiable leaf of ``primals``."""
    rows = []
    leaves, _ = tree_flatten_with_path(primals)
    for (path, primal), a, b in zip(leaves, tree_leaves(got), tree_leaves(expected)):
        if differentiable(jax.typeof(primal)) and primal.size:
            rows.append(_row(keystr(path), np.asarray(a), np.asarray(b), against, tolerance))
    return rows


def _row(operand, got, expected, against, tolerance):
    is_complex = jnp.issubdtype(expected.dtype, jnp.complexfloating)
    wide = np.complex128 if is_complex else np.float64
    got, expected = got.astype(wide), expected.astype(wide)
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(got - expected))
    finite = np.abs(expected[np.isfinite(expected)])
    scale = max(finite.max(initial=0.0), np.finfo(np.float64).tiny)
    worst = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)
    error = float(difference[worst] / scale)
    index = tuple(int(i) for i in worst)
    return Row(operand, against, error, tolerance, index, got[worst].item(), expected[worst].item())


def finite_differences(fun, primals, cotangent):
    """x̄ of every element by central differences of L(x) = Re Σ ȳ f(x).

    For a complex operand x̄ = ∂L/∂Re x − i ∂L/∂Im x, JAX's convention.
    """
    leaves, tree = jax.tree.flatten(primals)
    weights = tree_leaves(cotangent)

    def loss(leaf, i):
        out = tree_leaves(fun(*tree_unflatten(tree, [*leaves[:i], leaf, *leaves[i + 1 :]])))
        terms = [jnp.real(jnp.sum(w * y)) for w, y in zip(weights, out) if differentiable(w)]
        return sum(terms, jnp.zeros(()))

    def derivative(i, direction):
        x = leaves[i]
        basis = np.eye(x.size).reshape(x.size, *x.shape) * direction
        offsets = np.reshape(STEPS, (-1, *[1] * basis.ndim)) * H
        points = x + jnp.asarray(offsets * basis, x.dtype)
        values = jax.vmap(jax.vmap(lambda p: loss(p, i)))(points)
        return (jnp.asarray(WEIGHTS) @ values / H).reshape(x.shape)

    def leaf(i, x):
        if not differentiable(jax.typeof(x)):
            return np.zeros(x.shape, jax.dtypes.float0)
        if not jnp.issubdtype(x.dtype, jnp.complexfloating):
            return derivative(i, 1.0)
        return lax.complex(derivative(i, 1.0), -derivative(i, 1j))

    return tree_unflatten(tree, [leaf(i, x) for i, x in enumerate(leaves)])
