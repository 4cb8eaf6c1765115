"""Cotangents as the engine carries them, and the boundary every rule's result crosses.

A cotangent is `ZERO` (nothing flows), an array of its value's shape and dtype, or, where that is
welcome, one of the unevaluated forms of `fbprop.core.factored`. Unbroadcasting, precision, shape
and dtype checks are done here, once, so that no rule has to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core.devices import summed
from fbprop.core.factored import Factored, Rows
from fbprop.core.jaxcompat import sharded_like, zeros


@jax.tree_util.register_static
class Zero:
    """The symbolic zero: a pytree without leaves, so it costs nothing across `jit` and `scan`."""

    def __eq__(self, other):
        return isinstance(other, Zero)

    def __hash__(self):
        return hash(Zero)

    def __repr__(self):
        return "ZERO"


ZERO = Zero()


def is_zero(ct):
    return isinstance(ct, Zero)


def add(a, b):
    """Sum of two cotangents of one value."""
    if is_zero(a):
        return b
    if is_zero(b):
        return a
    if isinstance(a, Rows) and isinstance(b, Rows):
        return a.joined(b)
    if isinstance(a, Factored):
        return a.add_to(evaluated(b))
    return b.add_to(a) if isinstance(b, Factored) else lax.add(a, b)


def evaluated(ct):
    """The cotangent, an array if it is not `ZERO`."""
    return ct.dense() if isinstance(ct, Factored) else ct


def filled(ct, aval):
    """The cotangent, zeros for `ZERO`."""
    return zeros(aval) if is_zero(ct) else ct


def dense(ct, aval):
    """The cotangent as an array."""
    return evaluated(filled(ct, aval))


class CotangentError(TypeError):
    """A rule returned something that is not a cotangent of its operand."""


def check_count(rule, cts, expected):
    if len(cts) != expected:
        raise CotangentError(
            f"A rule returns one cotangent per operand, got {len(cts)} expected {expected} from "
            f"the rule for {rule.name!r} ({rule.where}): return None for an operand that gets none."
        )


def fit(ct, aval, site, rule, operand):
    """Bring what a rule returned to the type of its operand, or say what is wrong with it.

    `None` becomes `ZERO`. Where the rule declares that its primitive broadcasts, the dimensions
    that were expanded are summed. The dtype is adjusted only where the primitive itself changes it
    (a float16 operand with a float32 result; a real one with a complex result, which gets the real
    part); any other mismatch is an error in the rule. Where shardings are a part of types, it gets
    its operand's.
    """
    if ct is None or is_zero(ct):
        return ZERO
    if isinstance(ct, Factored):
        if (ct.shape, ct.dtype) == (aval.shape, aval.dtype):
            return ct
        ct = ct.dense()
    shape, dtype = jnp.shape(ct), jnp.result_type(ct)
    if rule.broadcasts and shape != aval.shape:
        ct = unbroadcast(ct, aval.shape)
        shape = jnp.shape(ct)
    if dtype != aval.dtype and _mixes_types(site, aval, dtype):
        ct, dtype = converted(ct, aval.dtype), aval.dtype
    if shape != aval.shape or dtype != aval.dtype:
        raise CotangentError(
            f"A cotangent has its operand's shape and dtype, got {dtype.name}{list(shape)} "
            f"expected {aval.dtype.name}{list(aval.shape)} for operand {operand} of {site.name!r}"
            f"{site.location()}: mend its rule ({rule.where})."
        )
    return sharded_like(ct, aval)


def unbroadcast(ct, shape):
    """``ct`` summed over the dimensions along which ``shape`` was broadcast, if it was."""
    if shape == ():
        return summed(ct, tuple(range(jnp.ndim(ct))))
    got, added = jnp.shape(ct), jnp.ndim(ct) - len(shape)
    if added < 0 or any(s not in (1, g) for s, g in zip(shape, got[added:])):
        return ct
    axes = tuple(i for i, g in enumerate(got) if i < added or (shape[i - added] == 1 and g != 1))
    return lax.reshape(summed(ct, axes), shape)


def _mixes_types(site, aval, dtype):
    return jnp.issubdtype(dtype, jnp.inexact) and any(a.dtype != aval.dtype for a in site.out_avals)


def converted(ct, dtype):
    """The cotangent of a value that was converted from this dtype: of a real one the real part."""
    if jnp.iscomplexobj(ct) and not jnp.issubdtype(dtype, jnp.complexfloating):
        ct = lax.real(ct)
    return lax.convert_element_type(ct, dtype)
