"""`fbprop.ops.linear_cross_entropy`: several chunks, what does not count, types, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import nn, ops

D, V = 3, 11


def drawn(n, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, w, b = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((n, D), (D, V), (V,)))
    return x, w, b, jnp.asarray(rng.integers(0, V, n))


def plain(x, w, b, labels, *, smoothing=0.0, z_loss=0.0, cap=None):
    """Losses by log-softmax of all logits."""
    z = x @ w + b
    z = z if cap is None else cap * jnp.tanh(z / cap)
    log_p = jax.nn.log_softmax(z)
    chosen = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
    lse = jax.nn.logsumexp(z, -1)
    return -(1 - smoothing) * chosen - smoothing * jnp.mean(log_p, -1) + z_loss * lse**2


@pytest.mark.parametrize("ad", [jax, fbprop], ids=["jax", "fbprop"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_are_the_whole(ad, reduction):
    """Of 600 rows two chunks of 256 and a rest."""
    x, w, b, labels = drawn(600)
    dy = jnp.cos(jnp.arange(600.0))
    reduced = {"mean": jnp.mean, "sum": jnp.sum, "none": lambda losses: jnp.sum(dy * losses)}

    def ours(x, w, b):
        y = ops.linear_cross_entropy(x, w, labels, bias=b, reduction=reduction,
                                     label_smoothing=0.1, z_loss=1e-2, soft_cap=2.0)
        return jnp.sum(dy * y) if reduction == "none" else y

    def theirs(x, w, b):
        return reduced[reduction](plain(x, w, b, labels, smoothing=0.1, z_loss=1e-2, cap=2.0))

    both = jax.jit(lambda *p: (ad.value_and_grad(ours, (0, 1, 2))(*p), ours(*p),
                               jax.value_and_grad(theirs, (0, 1, 2))(*p)))
    (value, grads), alone, (expected, wanted) = both(x, w, b)
    np.testing.assert_allclose([value, alone], expected, rtol=2e-5)
    for got, e in zip(grads, wanted):
        np.testing.assert_allclose(got, e, rtol=1e-4, atol=1e-5 * float(jnp.max(abs(e))))


def test_only_what_is_asked_for():
    x, w, b, labels = drawn(20)
    loss = lambda *p: ops.linear_cross_entropy(*p[:2], labels, bias=p[2])
    theirs = lambda *p: jnp.mean(plain(*p, labels))
    every = jax.jit(lambda *p: [[ad.grad(fun, argnum)(*p) for argnum in (0, 1, 2)] for ad, fun in (
        (jax, theirs), (jax, loss), (fbprop, loss))])
    for wanted, *found in zip(*every(x, w, b)):
        for got in found:
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-7)
    held = jax.eval_shape(lambda x: fbprop.vjp(lambda x: ops.linear_cross_entropy(x, w, labels),
                                               x)[1], x)
    assert sum(a.size for a in jax.tree.leaves(held)) == x.size + 2 * 20  # x̄, losses, shares


def test_ignored_and_weighted_rows_are_not_read():
    x, w, b, labels = drawn(20)
    skip = np.arange(20) % 3 == 0
    bad = jnp.where(skip[:, None], jnp.nan, x)
    real = np.flatnonzero(~skip)
    expected, wanted = jax.jit(jax.value_and_grad(
        lambda w: jnp.mean(plain(x[real], w, b, labels[real]))))(w)
    for options in ({"ignore_index": -100}, {"weights": jnp.where(skip, 0.0, 2.0)}):
        marked = jnp.where(skip, -100, labels) if "ignore_index" in options else labels
        value, (dx, dw) = jax.jit(fbprop.value_and_grad(
            lambda x, w, o=options, m=marked: ops.linear_cross_entropy(x, w, m, bias=b, **o),
            (0, 1)))(bad, w)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(dw, wanted, rtol=1e-4, atol=1e-6)
        assert (dx[skip] == 0).all()
    for reduction in ("mean", "sum"):
        value, dw = jax.jit(fbprop.value_and_grad(lambda w, r=reduction: ops.linear_cross_entropy(
            bad, w, jnp.full(20, -1), ignore_index=-1, reduction=r)))(w)
        assert value == 0
        assert (dw == 0).all()


def test_gradient_of_weights():
    x, w, b, labels = drawn(20)
    weights = jnp.linspace(0.5, 2.0, 20)
    mine = lambda s: ops.linear_cross_entropy(x, w, labels, bias=b, weights=s)
    mean = lambda s: jnp.sum(s * plain(x, w, b, labels)) / jnp.sum(s)
    got, wanted = jax.jit(lambda s: [jax.grad(f)(s) for f in (mine, mean)])(weights)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_label_outside_gives_nan():
    x, w, _, labels = drawn(5)
    for label in (-1, V):
        losses = ops.linear_cross_entropy(x, w, labels.at[2].set(label), reduction="none")
        np.testing.assert_array_equal(jnp.isnan(losses), jnp.arange(5) == 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits(dtype):
    x, w, b, labels = drawn(20, dtype)
    value, grads = jax.jit(fbprop.value_and_grad(
        lambda *p: ops.linear_cross_entropy(*p[:2], labels, bias=p[2]), (0, 1, 2)))(x, w, b)
    wide = [a.astype(jnp.float32) for a in (x, w, b)]
    mean = lambda *p: jnp.mean(plain(*p, labels))
    expected, wanted = jax.jit(jax.value_and_grad(mean, (0, 1, 2)))(*wide)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    for got, e in zip(grads, wanted):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32), e, atol=2e-2 * float(jnp.max(abs(e))))


def test_large_logits_and_several_dimensions():
    x, w, b, labels = drawn(20)
    value, grad = fbprop.value_and_grad(lambda x: ops.linear_cross_entropy(
        1e4 * x.reshape(4, 5, D), w, labels.reshape(4, 5), bias=b))(x)
    np.testing.assert_allclose(value, jnp.mean(plain(1e4 * x, w, b, labels)), rtol=1e-5)
    assert jnp.isfinite(grad).all()
    each = ops.linear_cross_entropy(x.reshape(4, 5, D), w, labels.reshape(4, 5), bias=b,
                                    reduction="none")
    np.testing.assert_allclose(each, plain(x, w, b, labels).reshape(4, 5), rtol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_of_nothing(reduction):
    run = lambda x, w: jnp.sum(ops.linear_cross_entropy(
        x, w, jnp.zeros(x.shape[0], int), reduction=reduction))
    value, (dx, dw) = fbprop.value_and_grad(run, (0, 1))(jnp.ones((0, D)), jnp.ones((D, V)))
    assert (value, dx.shape) == (0, (0, D))
    assert (dw == 0).all()


def test_is_the_loss_of_a_language_model():
    x, w, b, labels = drawn(20)
    got = ops.linear_cross_entropy(x, w, labels, bias=b, label_smoothing=0.1)
    wanted = nn.softmax_cross_entropy(x @ w + b, labels, label_smoothing=0.1)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"w": jnp.ones((V, D))}, ValueError, r"by w \[D, V\].*float32\[20, 3\] and float32\[11, 3\]"),
    ({"w": jnp.ones((D, V), jnp.bfloat16)}, ValueError, "same floating dtype"),
    ({"labels": jnp.ones(20)}, TypeError, "got labels of dtype float32 expected integers"),
    ({"labels": jnp.ones(3, int)}, ValueError, r"got labels of shape \(3,\) expected \(20,\)"),
    ({"bias": jnp.ones(3)}, ValueError, r"bias of .* has shape \(3,\), expected \(11,\)"),
    ({"weights": jnp.ones(3)}, ValueError, r"weights of .* has shape \(3,\), expected \(20,\)"),
    ({"label_smoothing": 1.0}, ValueError, r"got 1.0 expected a number in \[0, 1\)"),
    ({"soft_cap": 0.0}, ValueError, "got 0.0 expected a number above 0"),
    ({"reduction": "avg"}, ValueError, "'mean', 'sum' or 'none', got 'avg'"),
])
def test_says_what_is_wrong(change, error, message):
    x, w, _, labels = drawn(20)
    given = {"x": x, "w": w, "labels": labels, **change}
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(given.pop("x"), given.pop("w"), given.pop("labels"), **given)
