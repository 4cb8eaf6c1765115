"""Numbers as operands: in a jaxpr they are literals, without shape, and rules get arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from cases import CASES
from fbprop.check import compare, random_cotangent
from fbprop.core import jaxcompat as jc

# This one's own backward gives a cotangent to the number, which JAX refuses as well.
REFUSED_BY_JAX = "custom_vjp_call"


def equations(jaxpr):
    """Every equation of a jaxpr, inner ones as well."""
    for eqn in jc.open_jaxpr(jaxpr).eqns:
        yield eqn
        for _, inner in jc.sub_jaxprs(eqn.params):
            yield from equations(inner)


def takes_literal(case, fun, rest):
    """Whether the row can be written with this number, and its primitive then has a literal."""
    try:
        jaxpr = jax.make_jaxpr(fun)(*rest)
    except (TypeError, ValueError, IndexError, AttributeError):
        return False
    return any(
        eqn.primitive.name == case.name and not all(map(jc.is_var, eqn.invars))
        for eqn in equations(jaxpr)
    )


def with_numbers():
    """(row, function of the other operands, these), an operand in turn being a Python number."""
    for case in CASES:
        values = case.values()
        operands = jax.tree.map(jax.device_put, list(values))
        for i, operand in enumerate(operands):
            rest = operands[:i] + operands[i + 1 :]
            if not rest or not operand.size or case.name == REFUSED_BY_JAX:
                continue
            number = np.asarray(values[i]).reshape(-1)[0].item()
            fun = lambda *rest, f=case.fun, i=i, n=number: f(*rest[:i], n, *rest[i:])
            if takes_literal(case, fun, rest):
                yield case, fun, rest


def both(found, given):
    """[our cotangents, JAX's] of each function of the operands given, compiled as one."""
    cotangents = [random_cotangent(jax.eval_shape(f, *x)) for f, x in zip(found, given)]

    @jax.jit
    def run(given):
        return [
            [floats(ad.vjp(f, *x)[1](d)) for ad in (fbprop, jax)]
            for f, x, d in zip(found, given, cotangents)
        ]

    return run(given)


def floats(values):
    return [v for v in values if v.dtype != jax.dtypes.float0 and jc.differentiable(v)]


def test_every_rule_takes_a_number_wherever_its_primitive_does(x64):
    cases, found, given = zip(*with_numbers())
    bad = []
    for case, operands, results in zip(cases, given, both(found, given)):
        rows = compare(floats(operands), *results, case.id, case.tolerance.get("jax", 1e-12))
        bad += [str(row) for row in rows if not row.ok]
    assert not bad, "\n".join(bad)
    assert len({case.name for case in cases}) > 20


def from_a_loop(x):
    last, (twos, ys) = lax.scan(lambda c, t: (1.5, (2.0, t * c)), 0.5, x)
    return jnp.dot(ys, last) + jnp.dot(twos, x)


# Numbers are operands as they stand, and results of equations that contain others.
PRODUCTS = {
    "right": lambda x: jnp.dot(x, 1.5),
    "left": lambda x: jnp.dot(1.5, x),
    "scalars": lambda x: jnp.dot(x[0], 1.5),
    "inside": lambda x: jax.jit(lambda x: jnp.dot(x, 1.5))(x),
    "einsum": lambda x: jnp.einsum(",i,->i", 2.0, x, 1.5),
    "from a call": lambda x: jnp.dot(*jax.jit(lambda x: (x * 2, 1.5))(x)),
    "from a branch": lambda x: jnp.dot(
        *lax.cond(x[0] > 0, lambda x: (x * 2, 1.5), lambda x: (x, 2.5), x)
    ),
    "from a loop": from_a_loop,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_products_with_a_number(dtype):
    x = jnp.array([1.0, 2.0, 3.0], dtype)
    for ours, theirs in both(PRODUCTS.values(), [(x,)] * len(PRODUCTS)):
        assert ours[0].dtype == theirs[0].dtype == dtype
        np.testing.assert_array_equal(ours[0], theirs[0])


def test_numbers_do_not_warn_where_their_square_is_too_large():
    """NumPy's arithmetic of numbers would."""
    x, large = jnp.ones(3), np.float32(1e30)
    slope = fbprop.grad(lambda x: jnp.sum(jnp.arctan2(x, large)))(x)
    np.testing.assert_allclose(slope, 1e-30, rtol=1e-6)
