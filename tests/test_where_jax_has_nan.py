"""Derivatives that exist where JAX's are nan or inexact: the values are stated here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop.rules import library_functions

INF = float("inf")


def masked_entropy(x):
    p = jax.nn.softmax(x)
    return -jnp.sum(jax.scipy.special.xlogy(p, p))


def total(fun):
    return lambda x: jnp.sum(fun(x))


def of_two(fun):
    return lambda x: fun(x[0], x[1])


def products(x):
    of_segments = jax.ops.segment_prod(x, jnp.array([0, 0, 1, 1, 1]), 2)
    return jnp.dot(of_segments, jnp.array([1, 10], x.dtype))


def repeated(u):
    return jnp.ones(2, u.dtype).at[jnp.array([1, 1, 0])].mul(u).sum()


CASES = {
    "logsumexp of nothing": (jax.nn.logsumexp, [-INF, -INF], [0, 0]),
    "logsumexp with nothing": (jax.nn.logsumexp, [-INF, 1.0], [0, 1]),
    "logaddexp of nothing": (of_two(jnp.logaddexp), [-INF, -INF], [0, 0]),
    "logaddexp with nothing": (of_two(jnp.logaddexp), [-INF, 1.0], [0, 1]),
    "logaddexp of all": (of_two(jnp.logaddexp), [INF, 1.0], [1, 0]),
    "logaddexp with a number": (lambda x: jnp.logaddexp(x[0], -INF), [-INF], [0]),
    "logaddexp2 of nothing": (of_two(jnp.logaddexp2), [-INF, -INF], [0, 0]),
    "logaddexp2 with nothing": (of_two(jnp.logaddexp2), [2.0, -INF], [1, 0]),
    "cumlogsumexp of nothing": (total(jax.lax.cumlogsumexp), [-INF, -INF, -INF], [0, 0, 0]),
    "cumlogsumexp with nothing": (total(jax.lax.cumlogsumexp), [-INF, 1.0, -INF], [0, 2, 0]),
    "masked entropy": (masked_entropy, [-INF, 1.0, 1.0], [0, 0, 0]),
    "masked entropy, again": (jax.checkpoint(masked_entropy), [-INF, 1.0, 1.0], [0, 0, 0]),
    "log of exp of nothing": (lambda x: jnp.log(jnp.sum(jnp.exp(x))), [-INF], [0]),
    "gelu, large": (total(jax.nn.gelu), [6e4, 300.0, -300.0, -6e4], [1, 1, 0, 0]),
    "gelu, infinite": (total(jax.nn.gelu), [INF, -INF], [1, 0]),
    "gelu by erf, large": (total(lambda x: jax.nn.gelu(x, False)), [6e4, -300.0, INF], [1, 0, 1]),
    "silu, infinite": (total(jax.nn.silu), [INF, -INF], [1, 0]),
    "log_sigmoid, infinite": (total(jax.nn.log_sigmoid), [INF, -INF], [0, 1]),
    "hypot, infinite": (of_two(jnp.hypot), [INF, 1.0], [1, 0]),
    "segment_prod, one zero": (products, [0.0, 2.0, 3.0, 4.0, 5.0], [2, 0, 200, 150, 120]),
    "segment_prod, two zeros": (products, [0.0, 0.0, 0.0, 4.0, 0.0], [0, 0, 0, 0, 0]),
    "scatter_mul": (repeated, [0.0, 3.0, 0.0], [3, 0, 1]),
    "xlogy(0, 0)": (lambda a: jax.scipy.special.xlogy(0.0, a[0]), [0.0], [0]),
    "xlog1py(0, -1)": (lambda a: jax.scipy.special.xlog1py(0.0, a[0]), [-1.0], [0]),
    "gammainc at 0": (total(lambda x: jax.scipy.special.gammainc(1.0, x)), [0.0, INF], [1, 0]),
    "gammaincc at 0": (total(lambda x: jax.scipy.special.gammaincc(1.0, x)), [0.0], [-1]),
    "betainc at 0": (total(lambda x: jax.scipy.special.betainc(1.0, 2.0, x)), [0.0, 1.0], [2, 0]),
    "betainc at 1": (total(lambda x: jax.scipy.special.betainc(2.0, 1.0, x)), [0.0, 1.0], [0, 2]),
}
WIDE = {  # beyond float16
    "atan2, large": (of_two(jnp.arctan2), [1e25, 1e25], [5e-26, -5e-26]),
    "atan2, small": (of_two(jnp.arctan2), [1e-25, 1e-25], [5e24, -5e24]),
    "hypot, large": (of_two(jnp.hypot), [3e25, 4e25], [0.6, 0.8]),
    "hypot, small": (of_two(jnp.hypot), [3e-25, 4e-25], [0.6, 0.8]),
    "abs, large": (lambda x: abs(jax.lax.complex(x[0], x[1])), [3e25, 4e25], [0.6, 0.8]),
    "abs, small": (lambda x: abs(jax.lax.complex(x[0], x[1])), [3e-25, 4e-25], [0.6, 0.8]),
    "abs, infinite": (lambda x: abs(jax.lax.complex(x[0], x[1])), [-INF, 4.0], [-1, 0]),
}
NOT_IN_16_BITS = ("betainc", "gammainc", "abs")  # nor has jax any of these


def gradients(cases, dtype):
    return {n: fbprop.grad(fun)(jnp.asarray(x, dtype)) for n, (fun, x, _) in cases.items()}


@pytest.mark.parametrize(
    ("dtype", "jit"),
    [*((t, True) for t in ("float64", "float32", "bfloat16", "float16")), ("float32", False)],
)
def test_derivative_exists(dtype, jit, x64):
    cases = dict(CASES)
    if dtype != "float16":
        cases |= WIDE
    if jnp.dtype(dtype).itemsize == 2:
        cases = {n: c for n, c in cases.items() if not n.startswith(NOT_IN_16_BITS)}
    tolerance = 1e-2 if jnp.dtype(dtype).itemsize == 2 else 1e-5
    got = jax.jit(lambda: gradients(cases, dtype))() if jit else gradients(cases, dtype)
    for name, (_, _, expected) in cases.items():
        result = np.asarray(got[name], "float64")
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=0, err_msg=name)


def eigh_parts(f):
    def rebuilt(a):
        w, v = jnp.linalg.eigh(a)
        return (v * f(w).astype(v.dtype)) @ v.conj().T

    return rebuilt


def put_together(a):
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    return (u * s.astype(u.dtype)) @ vt


def orthogonal(n, dtype, seed):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n, n))
    return np.linalg.qr(q + 1j * rng.standard_normal((n, n)) if dtype[0] == "c" else q)[0]


def spectra(n):
    return {"all": np.full(n, 2.0), "two": np.r_[1.0, 1.0, np.arange(3.0, n + 1)],
            "pairs": np.repeat([0.5, 3.0], n // 2)}


TYPES = pytest.mark.parametrize("dtype", ["float64", "float32", "complex128"])
FUNCTIONS = {"w": lambda w: w, "w³ − w": lambda w: w**3 - w, "exp": jnp.exp, "1": jnp.ones_like}


def of_functions(f, values, dtype):
    """A gradient through `eigh`, and by Daleckii and Krein's divided differences, f' if equal."""
    q, g = (orthogonal(len(values), dtype, seed) for seed in range(2))
    a, weights = jnp.asarray((q * values) @ q.conj().T, dtype), jnp.asarray(g.conj(), dtype)
    gaps, slope = values[:, None] - values, jax.vmap(jax.grad(lambda w: f(w)))(jnp.asarray(values))
    divided = (f(values)[:, None] - f(values)) / np.where(gaps == 0, 1, gaps)
    divided = jnp.where(gaps == 0, slope[:, None], divided)
    g_h = (g + g.conj().T) / 2
    expected = q @ (divided.astype(q.dtype) * (q.conj().T @ g_h @ q)) @ q.conj().T
    got = fbprop.grad(lambda a: jnp.sum(eigh_parts(f)(a) * weights).real)(a)
    return got, expected.conj()


@TYPES
def test_functions_of_a_matrix_with_equal_eigenvalues(dtype, x64):
    names = [(n, which) for n in FUNCTIONS for which in spectra(4)]
    found = jax.jit(lambda: [of_functions(FUNCTIONS[n], spectra(4)[w], dtype) for n, w in names])()
    tolerance = 1e-4 if dtype == "float32" else 1e-9
    for name, (got, expected) in zip(names, found):
        scale = 1 + np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=tolerance * scale, err_msg=name)


@TYPES
def test_a_matrix_put_together_of_equal_singular_values(dtype, x64):
    u, v, g = (orthogonal(6, dtype, seed) for seed in range(3))
    names = [(s, which) for s in ((4, 4), (6, 4), (4, 6)) for which in spectra(4)]

    def gradient(m, n, values):
        a = jnp.asarray((u[:m, :4] * values) @ v[:4, :n], dtype)
        weights = jnp.asarray(g[:m, :n].conj(), dtype)
        return fbprop.grad(lambda a: jnp.sum(put_together(a) * weights).real)(a), weights

    found = jax.jit(lambda: [gradient(*shape, spectra(4)[which]) for shape, which in names])()
    for name, (got, expected) in zip(names, found):
        tolerance = 1e-4 if dtype == "float32" else 1e-9
        np.testing.assert_allclose(got, expected, atol=tolerance, err_msg=name)


def test_what_has_no_derivative_at_equal_values_is_not_a_number(x64):
    weights = jnp.arange(9.0).reshape(3, 3)

    def two_functions(a):
        w, v = jnp.linalg.eigh(a)
        return jnp.sum((v * jnp.exp(w)) @ v.T * weights**2 + (v * jnp.sin(w)) @ v.T * weights)

    def one_vector(a):
        return jnp.dot(jnp.linalg.eigh(a)[1][:, 0], weights[0])

    for fun in (two_functions, one_vector):
        assert not np.isfinite(fbprop.grad(fun)(jnp.eye(3))).all()


@pytest.mark.parametrize("fun", [jnp.var, jnp.std, lambda x: jnp.var(x, ddof=1)])
@pytest.mark.parametrize("mean", [0.0, 1e4, -3e5])
def test_variance_of_numbers_far_from_zero(fun, mean, x64):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1000) + mean, "float32")
    exact = np.asarray(jax.jit(jax.grad(fun))(x.astype("float64")))
    ours, theirs = (np.abs(np.asarray(m.grad(fun)(x)) - exact).max() for m in (fbprop, jax))
    assert ours <= 1.5 * theirs + 1e-7 * np.abs(exact).max()


def test_softmax_in_one_kernel_of_a_gpu(monkeypatch, x64):
    x = jnp.array([[0.5, -INF, 2.0], [1.0, 2.0, 3.0], [0.0, -INF, -1.0]])
    dy = jnp.array([[1.0, INF, -3.0], [4.0, 4.0, 4.0], [2.0, jnp.nan, jnp.nan]])
    gradient = lambda: fbprop.vjp(jax.nn.softmax, x)[1](dy)[0]
    expected = gradient()
    monkeypatch.setattr(library_functions, "by_platform", lambda *xs, cuda, **_: cuda(*xs))
    np.testing.assert_allclose(gradient(), expected, rtol=1e-12, atol=1e-15)
    p = np.exp([0.5, 2.0]) / np.sum(np.exp([0.5, 2.0]))
    of_two = 4 * p[0] * p[1]
    np.testing.assert_allclose(expected[:2], [[of_two, 0, -of_two], [0, 0, 0]], atol=1e-14)
    np.testing.assert_array_equal(expected[2], [jnp.nan, 0, jnp.nan])
    one = lambda x, d: jnp.vdot(jnp.arange(3.0), fbprop.vjp(jax.nn.softmax, x)[1](d)[0])
    twice = fbprop.grad(one, (0, 1))
    same = jnp.ones((1, 3))  # of equal cotangents too, where a minimum has half a slope
    found = twice(x[1:2], same)
    monkeypatch.undo()
    for a, b in zip(found, twice(x[1:2], same)):
        np.testing.assert_allclose(a, b, atol=1e-15)
    monkeypatch.setattr(library_functions, "by_platform", lambda *xs, cuda, **_: cuda(*xs))
    monkeypatch.setattr(library_functions, "LONGEST", 2)
    np.testing.assert_allclose(gradient(), expected, rtol=1e-12, atol=1e-15)


def test_softmax_on_a_tpu_sums_each_row_once(monkeypatch, x64):
    x, dy = jnp.array([[0.5, -INF, 2.0]]), jnp.array([[1.0, INF, -3.0]])
    gradient = jax.jit(lambda x, dy: fbprop.vjp(jax.nn.softmax, x)[1](dy)[0])
    for platform, barriers in {"tpu": 1, "cuda": 0, "cpu": 0}.items():
        text = gradient.trace(x, dy).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("optimization_barrier") == barriers, platform
    expected = gradient(x, dy)
    monkeypatch.setattr(library_functions, "by_platform", lambda *xs, default, **_: default(*xs))
    monkeypatch.setattr(library_functions, "at_lowering", lambda *xs, tpu, **_: tpu(*xs))
    on_tpu = jax.jit(lambda x, dy: fbprop.vjp(jax.nn.softmax, x)[1](dy)[0])
    np.testing.assert_allclose(on_tpu(x, dy), expected, rtol=1e-12)
