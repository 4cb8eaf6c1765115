"""`vjp`, `grad`, `value_and_grad`: signatures, pytrees, transformations and errors, as JAX's."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop

X = jnp.array([[0.5, -1.0]])


class Point(NamedTuple):
    x: jax.Array
    y: jax.Array


def network(params, x):
    h = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.sum(h * h)


@pytest.fixture
def params():
    return {
        "w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3),
        "b": jnp.ones(3),
        "none": None,
        "empty": (),
    }


def same(a, b, rtol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)


@pytest.mark.parametrize("argnums", [0, 1, -1, (0, 1), (1, 0), [0], (-2,)])
def test_argnums(params, argnums):
    same(fbprop.grad(network, argnums)(params, X), jax.jit(jax.grad(network, argnums))(params, X))


def test_aux_and_keyword_arguments(params):
    def fun(p, *, x):
        return network(p, x), {"h": x * 2, "name": "aux"}

    (value, aux), gradient = fbprop.value_and_grad(fun, has_aux=True)(params, x=X)
    same(value, network(params, X))
    same(aux["h"], X * 2)
    gradient_, aux_ = fbprop.grad(fun, has_aux=True)(params, x=X)
    same(gradient, gradient_)
    same(gradient, jax.jit(jax.grad(network))(params, X))
    assert aux["name"] == aux_["name"] == "aux"


def test_vjp_with_aux_and_several_outputs():
    def fun(x, y):
        return {"a": jnp.sin(x) * y, "b": x}, jnp.cos(x)

    out, pullback, aux = fbprop.vjp(fun, X, X + 1, has_aux=True)
    expected, jax_pullback, jax_aux = jax.vjp(fun, X, X + 1, has_aux=True)
    same((out, aux), (expected, jax_aux))
    ct = {"a": jnp.full_like(X, 2.0), "b": X}
    same(pullback(ct), jax_pullback(ct))


def test_pytree_types_survive():
    point = Point(X, {"deep": [X, None]})
    gradient = fbprop.grad(lambda p: jnp.sum(p.x * p.y["deep"][0]))(point)
    assert isinstance(gradient, Point)
    same(gradient, point)


def test_unused_and_constant_outputs():
    same(fbprop.grad(lambda x, y: jnp.sum(y), (0, 1))(X, X), (X * 0, jnp.ones_like(X)))
    same(fbprop.vjp(lambda x: 3.0, X)[1](1.0), (X * 0,))
    same(fbprop.vjp(lambda x: x, X)[1](X), (X,))


def test_integer_inputs_have_float0_cotangents():
    i = jnp.array([1, 2])
    d_x, d_i = fbprop.vjp(lambda x, i: x * i.astype(x.dtype), X[0], i)[1](X[0])
    assert d_i.dtype == jax.dtypes.float0
    assert d_i.shape == (2,)
    same(d_x, X[0] * i.astype(X.dtype))
    assert fbprop.grad(lambda i: jnp.sum(i * 2.0), allow_int=True)(3).dtype == jax.dtypes.float0
    _, pullback = fbprop.vjp(lambda x: (x, i), X)
    zero = np.zeros((2,), jax.dtypes.float0)
    same(pullback((X, zero)), (X,))
    out = lambda x: (x * 2.0, 3)
    for zero in (0, jnp.zeros((), int), np.zeros((), jax.dtypes.float0)):  # of an integer result
        assert fbprop.vjp(out, 1.0)[1]((1.0, zero)) == (2.0,)


def test_complex_follows_jax_conventions():
    z = jnp.array([1.0 + 2.0j, -0.5j])
    holomorphic = lambda z: jnp.sum(z * z * z)
    same(fbprop.grad(holomorphic, holomorphic=True)(z), jax.grad(holomorphic, holomorphic=True)(z))


def test_under_transformations(params):
    ours, theirs = fbprop.grad(network, (0, 1)), jax.grad(network, (0, 1))
    expected = theirs(params, X)
    same(jax.jit(ours)(params, X), expected)
    batch = jnp.stack([X, 2 * X, -X])
    same(jax.vmap(ours, (None, 0))(params, batch), jax.vmap(theirs, (None, 0))(params, batch))
    same(lax.map(lambda x: ours(params, x), batch), lax.map(lambda x: theirs(params, x), batch))

    def steps(gradient):
        move = lambda x, _: (x - 0.1 * gradient(params, x)[1], jnp.sum(x))
        return lax.scan(move, X, None, length=3)

    same(steps(ours), steps(theirs))


def test_gradients_of_gradients(params):
    def norm(gradient):
        return lambda p: sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradient(network)(p, X)))

    expected = jax.jit(jax.grad(norm(jax.grad)))(params)
    for outer, inner in [
        (fbprop.grad, fbprop.grad),
        (jax.grad, fbprop.grad),
        (fbprop.grad, jax.grad),
    ]:
        same(outer(norm(inner))(params), expected, 1e-5)
        same(jax.jit(outer(jax.jit(norm(inner))))(params), expected, 1e-5)
    thrice = lambda g: g(g(g(lambda x: jnp.sin(x) * jnp.exp(x))))
    same(thrice(fbprop.grad)(0.3), thrice(jax.grad)(0.3), 1e-5)


def test_forward_mode_over_reverse():
    f = lambda x: jnp.sum(jnp.tanh(x) ** 3)
    v = jnp.ones_like(X)
    same(jax.jvp(fbprop.grad(f), (X,), (v,)), jax.jvp(jax.grad(f), (X,), (v,)))
    same(jax.jit(jax.jacfwd(fbprop.grad(f)))(X), jax.jit(jax.hessian(f))(X))
    same(jax.jit(jax.hessian(lambda x: fbprop.vjp(f, x)[0]))(X), jax.jit(jax.hessian(f))(X))


def test_closed_over_tracers():
    def outer(gradient):
        def fun(w, x):
            return jnp.sum(gradient(lambda y: jnp.sum(jnp.tanh(w * y)))(x) ** 2)

        return fun

    w = 0.7
    expected = jax.jit(jax.grad(outer(jax.grad)))(w, X)
    same(jax.jit(jax.grad(outer(fbprop.grad)))(w, X), expected)
    same(fbprop.grad(outer(fbprop.grad))(w, X), expected)
    same(jax.jit(fbprop.grad(outer(fbprop.grad)))(w, X), expected)
    same(
        jax.vmap(fbprop.grad(outer(fbprop.grad)), (0, None))(jnp.full(2, w), X),
        jnp.stack([expected] * 2),
    )


def test_pullback_crosses_jit():
    f = lambda x: jnp.sin(x) * x
    out, pullback = jax.jit(lambda x: fbprop.vjp(f, x))(X)
    same(out, f(X))
    same(jax.jit(lambda p, d: p(d))(pullback, X), jax.vjp(f, X)[1](X))
    same(
        jax.vmap(pullback)(jnp.stack([X, 2 * X])), jax.vmap(jax.vjp(f, X)[1])(jnp.stack([X, 2 * X]))
    )
    assert "keeping 16 bytes" in repr(pullback)


def test_side_outputs_run_once(capfd):
    def f(x):
        jax.debug.print("seen {}", x)
        return lax.scan(lambda c, _: (jnp.sin(c), jax.debug.print("step")), x, None, length=2)[0]

    fbprop.grad(f)(1.0)
    jax.effects_barrier()
    out = capfd.readouterr().out
    assert (out.count("seen"), out.count("step")) == (1, 2)


def test_python_scalars_and_numpy_arrays():
    same(fbprop.grad(lambda x: x * x)(3.0), jnp.asarray(6.0))
    same(fbprop.grad(lambda x: jnp.sum(x * x))(np.ones(3, np.float32)), 2 * jnp.ones(3))


def test_shape_errors_match_the_function_at_fault():
    def fails(match, fun, *args, error=TypeError):
        with pytest.raises(error, match=match):
            fun(*args)

    fails(
        "Gradient only defined for scalar-output functions. Output had shape",
        fbprop.grad(lambda x: x),
        X,
    )
    fails(
        "Gradient only defined for scalar-output functions. Output was",
        fbprop.grad(lambda x: (x, x)),
        1.0,
    )
    fails(
        "grad requires real- or complex-valued inputs .* int32", fbprop.grad(lambda x: x * 1.0), 3
    )
    fails(
        "grad requires real- or complex-valued inputs .* bool", fbprop.grad(lambda x: x * 1.0), True
    )
    fails("grad requires real-valued outputs .* complex64", fbprop.grad(lambda x: x * 1j), 1.0)
    fails("grad requires real-valued outputs .* int32", fbprop.grad(lambda x: 3), 1.0)
    fails(
        "holomorphic=True requires inputs with complex dtype, but got float32",
        fbprop.grad(lambda x: x, holomorphic=True),
        1.0,
    )
    fails(
        "holomorphic=True requires outputs with complex dtype, but got float32",
        fbprop.grad(jnp.abs, holomorphic=True),
        1.0 + 1j,
    )
    fails(
        "requires at least 2 positional arguments",
        fbprop.grad(lambda x: x, 1),
        1.0,
    )
    fails("expected a callable", fbprop.vjp, 3, 1.0)
    fails("expected a callable", fbprop.grad, 3)
    fails("not a valid JAX type", fbprop.grad(lambda x: 1.0), "text")
    fails("expected a tuple of length 2", lambda: fbprop.vjp(lambda x: x, 1.0, has_aux=True))
    fails("expected fbprop.Table", lambda: fbprop.grad(lambda x: x, rules={})(1.0))
    fails(
        "expected 'registered', 'jax' or None",
        lambda: fbprop.grad(lambda x: x, fallback="torch")(1.0),
        error=ValueError,
    )


def test_cotangent_errors():
    _, pullback = fbprop.vjp(lambda x: {"y": x}, X)
    with pytest.raises(ValueError, match="Tree structure of cotangent input"):
        pullback(X)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "got an unexpected JAX type for argument to vjp "
            "function: float32[2] expected float32[1,2]"
        ),
    ):
        pullback({"y": X[0]})
    with pytest.raises(ValueError, match=r"float16\[1,2\] expected float32\[1,2\]"):
        pullback({"y": X.astype("float16")})
    _, pullback = fbprop.vjp(lambda x: 3, X)
    with pytest.raises(ValueError, match=r"float32\[2\] expected float0\[\], that of output"):
        pullback(X[0])
