"""Library functions traced into their caller: found where they are, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop

X = jnp.linspace(-2.0, 2.0, 15).reshape(3, 5)
LABELS = jnp.asarray([1, -1, 0], jnp.int32)


def used(fun, *args):
    """Names of the library functions whose rules differentiate a function."""
    return [line.rule for line in fbprop.explain(fun, *args).lines if "." in line.rule]


def cross_entropy(x, labels=LABELS):
    log_p = jax.nn.log_softmax(x)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1))


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (lambda x: jax.nn.gelu(x), ["jax.nn.gelu"]),
        (lambda x: jax.nn.gelu(x, approximate=False) * x, ["jax.nn.gelu"]),
        (lambda x: jax.nn.gelu(jax.nn.gelu(x)), ["jax.nn.gelu"] * 2),
        (lambda x: jax.nn.softmax(x, axis=0), ["jax.nn.softmax"]),
        (jax.jit(lambda x: jax.nn.softmax(2.0 * x)), ["jax.nn.softmax"]),
        (lambda x: jnp.var(x, axis=(0, 1)), ["jax.numpy.var"]),
        (lambda x: jax.nn.standardize(x, axis=0, epsilon=0.1) + jax.nn.standardize(x),
         ["jax.nn.standardize"] * 2),
        (cross_entropy, ["jax.nn.log_softmax"]),
        (lambda x: lax.fori_loop(0, 3, lambda _, c: jax.jit(cross_entropy)(c * x), x[0, 0]),
         ["jax.nn.log_softmax"]),
        (lambda x: lax.scan(lambda c, _: (jax.jit(jax.nn.gelu)(c * x), None), x, None, 3)[0],
         ["jax.nn.gelu"]),
        (lambda x: jax.vmap(cross_entropy, (None, 0))(x, jnp.stack([LABELS, LABELS])), None),
    ],
)
def test_found(fun, expected, x64):
    x = X.astype("float64")
    if expected is not None:
        assert used(fun, x) == expected
    scalar = lambda x: jnp.sum(jnp.sin(fun(x)))
    got, theirs = jax.jit(lambda x: [ad.grad(scalar)(x) for ad in (fbprop, jax)])(x)
    np.testing.assert_allclose(got, theirs, rtol=1e-12, atol=1e-14)


def almost_gelu(x):
    """One literal is another."""
    return 0.5 * x * lax.erfc(-x * 1.5 * float(np.sqrt(0.5)))


def watched_softmax(x):
    """What is computed on the way is used elsewhere, too."""
    e = jnp.exp(x - lax.stop_gradient(jnp.max(x, -1, keepdims=True, initial=-jnp.inf)))
    return e / jnp.sum(e, -1, keepdims=True) + e


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (almost_gelu, []),
        (watched_softmax, []),
        (lambda x: jax.nn.softmax(x, where=X > -3.0), []),
        (lambda x: jax.nn.standardize(x, mean=x[:, :1]), []),
        (lambda x: jax.nn.standardize(x, epsilon=x[0, 0] ** 2), []),
        (lambda x: jax.nn.standardize(x, algorithm="stable"), []),
    ],
)
def test_what_only_looks_like_it_is_left_alone(fun, expected, x64):
    x = X.astype("float64")
    assert used(fun, x) == expected
    scalar = lambda x: jnp.sum(jnp.sin(fun(x)))
    got, theirs = fbprop.grad(scalar)(x), jax.jit(jax.grad(scalar))(x)
    np.testing.assert_allclose(got, theirs, rtol=1e-12, atol=1e-14)


def test_a_rule_in_one_scope_leaves_the_others_to_their_parts():
    parts = fbprop.Table([r for n, r in fbprop.table.items() if n != "jax.nn.gelu"])
    frozen = fbprop.rule("jax.nn.gelu", "", x=lambda dy: None)
    table = parts.override(frozen, where="frozen/*")

    def fun(x):
        with jax.named_scope("frozen"):
            y = jax.nn.gelu(x)
        return jnp.sum(y + jax.nn.gelu(x))

    expected = jax.jit(jax.grad(lambda x: jnp.sum(jax.nn.gelu(x))))(X)
    np.testing.assert_allclose(fbprop.grad(fun, rules=table)(X), expected, rtol=1e-5, atol=1e-6)


def test_complex_operands_are_left_to_the_parts():
    assert used(lambda x: jnp.abs(jnp.var(lax.complex(x, x))), X) == []


@pytest.mark.parametrize(("part", "fun"), [
    ("tanh", jax.nn.gelu), ("logistic", jax.nn.silu), ("exp", jax.nn.log_softmax),
    ("exp", jax.nn.softmax),
])
def test_an_overridden_part_is_used_inside_the_function(part, fun):
    nothing = fbprop.rule(part, "x̄ = 0", x=lambda dy: None)
    scalar = lambda x: jnp.sum(jnp.sin(fun(x)))
    by_parts = fbprop.grad(scalar, rules=fbprop.table.override(nothing))(X)
    assert not np.allclose(by_parts, fbprop.grad(scalar)(X))
    whole = fbprop.rule(f"jax.nn.{fun.__name__}", "x̄ = ȳ", x=lambda dy: dy)
    both = fbprop.grad(scalar, rules=fbprop.table.override(nothing).override(whole))(X)
    np.testing.assert_allclose(both, jnp.cos(fun(X)), rtol=1e-5)
