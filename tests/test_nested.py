"""JAX's transformations around and inside of fbprop's, and every kind of derivative a user defines.

One jitted function computes all entries with fbprop's functions and with JAX's.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero, linear_call

import fbprop

X = np.array([0.5, -1.0, 2.0], "float32")
FLOAT0 = jax.dtypes.float0


def fun(x):
    return jnp.sum(jnp.sin(x) * x**2)


def custom_vjp(fun, fwd, bwd, nondiff_argnums=(), **options):
    defined = jax.custom_vjp(fun, nondiff_argnums=nondiff_argnums)
    defined.defvjp(fwd, bwd, **options)
    return defined


def custom_jvp(fun, jvp, nondiff_argnums=(), **options):
    defined = jax.custom_jvp(fun, nondiff_argnums=nondiff_argnums)
    defined.defjvp(jvp, **options)
    return defined


def product(x, y):
    return x * y


def filled(x):
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x


applied = custom_vjp(
    lambda f, x, n: f(x) * n,
    lambda f, x, n: (f(x) * n, x),
    lambda f, n, x, d: (jnp.cos(x) * n * d * 2.0,),
    nondiff_argnums=(0, 2),
)
numbered = custom_vjp(  # an integer operand, whose cotangent is None or float0
    lambda x, i: x * i.astype(x.dtype),
    lambda x, i: (x * i.astype(x.dtype), i),
    lambda i, d: (3.0 * d, None),
)
counted = custom_vjp(
    lambda x, i: x * i.astype(x.dtype),
    lambda x, i: (x, i),
    lambda i, d: (5.0 * d, np.zeros(i.shape, FLOAT0)),
)
partly = custom_vjp(product, lambda x, y: (x * y, y), lambda y, d: (d * y * 2.0, None))
nested = custom_vjp(
    lambda p, x: (p["w"] * x, x),
    lambda p, x: ((p["w"] * x, x), (p, x)),
    lambda k, d: ({"w": d[0] * k[1], "n": None}, d[0] * k[0]["w"] + d[1]),
)
again = custom_vjp(
    jnp.sin, lambda x: (jnp.sin(x), x), lambda x, d: (d * jnp.cos(x) * 3.0,), optimize_remat=True
)
half = custom_vjp(lambda x: x * 2.0, lambda x: (x * 2.0, ()), lambda _, d: (d.astype("float16"),))
symbolic = custom_vjp(
    lambda x, y: (x * y, x + y),
    lambda x, y: ((x.value * y.value, x.value + y.value), (x.value, y.value)),
    lambda k, d: (filled(d[0]) * k[1] + (7.0 if isinstance(d[1], SymbolicZero) else d[1]),
                  filled(d[0]) * k[0] + filled(d[1])),
    symbolic_zeros=True,
)
tripled = custom_jvp(jnp.sin, lambda p, t: (jnp.sin(p[0]), 3.0 * jnp.cos(p[0]) * t[0]))
shared = custom_vjp(
    lambda x, y: (x * y, y * 2.0),
    lambda x, y: ((x * y, y * 2.0), (x, y)),
    lambda k, d: (d[0] * k[1], d[0] * k[0] + 2.0 * d[1]),
)
one_moves = custom_jvp(product, lambda p, t: (p[0] * p[1], t[0] * p[1]))
nothing = custom_vjp(lambda x: None, lambda x: (None, x), lambda x, d: (x * 0.0,))
through = custom_jvp(
    lambda f, x: f(x), lambda f, p, t: (f(p[0]), f(p[0]) * t[0]), nondiff_argnums=(0,)
)
indexed = custom_jvp(
    lambda x, i: (x * i.astype(x.dtype), i),
    lambda p, t: ((p[0], p[1]), (t[0] * 2.0, np.zeros(p[1].shape, FLOAT0))),
)


@jax.custom_gradient
def squared(x):
    return x**2, lambda d: d * x


@jax.custom_gradient
def both(x, y):
    return x * y, lambda d: (d * y * 2.0, x * 3.0)


@partial(custom_vjp, fwd=lambda f, x, *c: (f(x, *c), c), nondiff_argnums=(0,),
         bwd=lambda f, c, d: (d * 2.0, *(7.0 * k for k in c)))
def closed(f, x, *consts):
    return f(x, *consts)


def closure(x, w):
    f, consts = jax.closure_convert(lambda x: jnp.sin(x) * w, x)
    return closed(f, x, *consts)


def linear(x, w=X):
    return linear_call(lambda w, x: w * x, lambda w, d: 3.0 * w * d, jnp.asarray(w), x)


def of_nothing(x):
    nothing(x)
    return jnp.sin(x)


def of_shared(x, y):
    """The second result, which is not mapped, can get a cotangent, and does not."""
    return one_moves(*jax.vmap(shared, in_axes=(0, None), out_axes=(0, None))(x, y))


def total(f):
    return lambda *args: sum(jnp.sum(y) for y in jax.tree.leaves(f(*args)) if jnp.isrealobj(y))


def twice(f):
    """A loop of two steps."""
    return lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]


def inside(grad, vjp):
    """JAX's transformations inside of what is differentiated, and a user's derivatives."""
    cube = lambda x: jnp.sin(x) * x**3
    order = jnp.arange(3)
    return {
        "jacfwd": lambda x: grad(lambda x: jnp.sum(jax.jacfwd(cube)(x) ** 2))(x),
        "jacrev": lambda x: grad(lambda x: jnp.sum(jax.jacrev(cube)(x) ** 2))(x),
        "hessian": lambda x: grad(lambda x: jnp.sum(jax.hessian(fun)(x) ** 2))(x),
        "jvp": lambda x: grad(lambda x: jax.jvp(fun, (x,), (x,))[1])(x),
        "linearize": lambda x: grad(lambda x: jax.linearize(fun, x)[1](x))(x),
        "linear_transpose": lambda x: grad(
            lambda x: jnp.sum(jax.linear_transpose(lambda y: y * x, x)(x)[0] ** 2)
        )(x),
        "applied": grad(total(lambda x: applied(jnp.sin, x, 3.0))),
        "applied, twice": grad(lambda x: fun(grad(total(lambda x: applied(jnp.sin, x, 3.0)))(x))),
        "numbered": grad(total(lambda x: numbered(x, order))),
        "counted": grad(total(lambda x: counted(x, order))),
        "partly": lambda x: grad(total(partly), (0, 1))(x, x + 1),
        "nested": lambda x: grad(total(nested), (0, 1))({"w": x, "n": x}, x),
        "nested, None": lambda x: grad(total(nested), (0, 1))({"w": x, "n": None}, x),
        "again": grad(total(again)),
        "again, loop": grad(total(twice(again))),
        "again, made again": grad(total(jax.checkpoint(again))),
        "again, vmap": jax.vmap(grad(again)),
        "symbolic": lambda x: grad(total(symbolic), (0, 1))(x, x + 1),
        "symbolic, one": lambda x: grad(total(lambda x, y: symbolic(x, y)[0]), (0, 1))(x, x + 1),
        "symbolic, loop": grad(total(twice(lambda x: symbolic(x, X)[0]))),
        "shared": lambda x: grad(total(of_shared), (0, 1))(x, x[0]),
        "nothing": grad(total(of_nothing)),
        "tripled": grad(total(tripled)),
        "tripled, twice": grad(lambda x: fun(grad(total(tripled))(x))),
        "through": grad(total(lambda x: through(jnp.sin, x))),
        "indexed": grad(total(lambda x: indexed(x, order)[0])),
        "squared, twice": grad(lambda x: fun(grad(total(squared))(x))),
        "both": lambda x: grad(total(both), (0, 1))(x, x + 1),
        "closure_convert": lambda x: grad(total(closure), (0, 1))(x, x + 1),
        "linear_call": grad(total(lambda x: linear(x) ** 2)),
        "linear_call, twice": grad(lambda x: fun(grad(total(lambda x: linear(x) ** 2))(x))),
        "linear_call, loop": grad(total(twice(linear))),
    }


def outside(grad, vjp):
    """JAX's transformations of gradients and pullbacks."""
    turned = lambda x: jnp.sin(x) * x[::-1]
    return {
        "rows": lambda x: jax.vmap(vjp(turned, x)[1])(jnp.eye(3)),
        "rows, integers": lambda x: jax.vmap(
            vjp(lambda x, i: x * i.astype(x.dtype), x, jnp.arange(3))[1]
        )(jnp.eye(3))[0],
        "jvp of grad": lambda x: jax.jvp(grad(fun), (x,), (2 * x,)),
        "jvp of jvp": lambda x: jax.jvp(lambda x: jax.jvp(grad(fun), (x,), (x,))[1], (x,), (x,)),
        "linearize": lambda x: jax.linearize(grad(fun), x)[1](x),
        "linear_transpose": lambda x: jax.linear_transpose(vjp(jnp.sin, x)[1], x)((x,)),
        "jacfwd": jax.jacfwd(grad(fun)),
        "jacrev": jax.jacrev(grad(fun)),
        "checkpoint": jax.checkpoint(grad(fun)),
        "of a checkpoint": grad(jax.checkpoint(lambda x: jnp.sum(grad(fun)(x) ** 2))),
        "jax.grad of a checkpoint": jax.grad(jax.checkpoint(lambda x: jnp.sum(grad(fun)(x) ** 2))),
        "third": jax.vmap(grad(grad(grad(lambda x: jnp.sin(x) * x**3)))),
        "descent": lambda x: lax.fori_loop(0, 3, lambda _, x: x - 0.1 * grad(fun)(x), x),
        "closed over": lambda x: grad(lambda w: jnp.sum(grad(lambda y: jnp.sum(y * w * w))(x)))(x),
        "confusion": jax.vmap(grad(lambda x: x * grad(lambda y: x + y)(x))),
        "confusion, forward": jax.vmap(
            grad(lambda x: x * jax.jvp(lambda y: x + y, (x,), (1.0,))[1])
        ),
        "same thrice": lambda x: vjp(lambda x: (x, x, x * 2), x)[1]((x, x, x)),
    }


def test_equal_to_jax():
    def run(grad, vjp, x):
        both = (inside(grad, vjp), outside(grad, vjp))
        return [{name: entry(x) for name, entry in entries.items()} for entries in both]

    compute = jax.jit(lambda x: (run(fbprop.grad, fbprop.vjp, x), run(jax.grad, jax.vjp, x)))
    ours, theirs = compute(X)
    for got, expected in zip(ours, theirs, strict=True):
        compare(got, expected)


def test_a_function_without_results_has_a_pullback_on_known_values():
    np.testing.assert_array_equal(fbprop.vjp(nothing, X)[1](None), np.zeros((1, 3)))


def compare(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for name, value in expected.items():
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(value), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5, err_msg=name)


def test_a_number_that_a_users_function_hands_on_is_an_array_to_their_derivative():
    kinds = []
    same = custom_jvp(lambda x: x, lambda p, t: (p[0], t[0]))
    looks = custom_vjp(
        product, lambda x, y: (x * y, y), lambda y, d: (kinds.append(type(y)), (d * y, None))[1]
    )
    inner = custom_jvp(lambda x: x * 3, lambda p, t: (p[0] * 3, looks(t[0], same(3))))
    assert fbprop.grad(lambda x: looks(x, same(2.0)))(1.0) == 2
    assert fbprop.grad(inner)(1.0) == 3
    assert len(kinds) == 2
    assert all(issubclass(kind, jax.Array) for kind in kinds)


def test_a_users_cotangent_in_another_precision_is_taken_and_keeps_the_primals():
    found = fbprop.grad(total(half))(X)
    assert found.dtype == "float32"
    np.testing.assert_array_equal(found, jax.grad(total(half))(X))


WRONG = {
    "shape": (custom_vjp(jnp.sin, lambda x: (x, ()), lambda _, d: (d[:1],)), ValueError),
    "count": (custom_vjp(jnp.sin, lambda x: (x, ()), lambda _, d: (d, d)), TypeError),
    "no tuple": (custom_vjp(jnp.sin, lambda x: (x, ()), lambda _, d: d), TypeError),
    "no vjp": (jax.custom_vjp(jnp.sin), AttributeError),
    "no jvp": (jax.custom_jvp(jnp.sin), AttributeError),
    "tangent": (custom_jvp(jnp.sin, lambda p, t: (p[0], t[0][:1])), TypeError),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_derivatives_of_the_users_are_errors_as_in_jax(kind):
    wrong, error = WRONG[kind]
    for grad in (jax.grad, fbprop.grad):
        with pytest.raises(error):
            grad(total(wrong))(X)
