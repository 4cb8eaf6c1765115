"""`fbprop.ops.attention`: longer than a block, what is not seen, types, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import ops
from fbprop.core import kernels
from fbprop.rules.attend import plain
from fbprop.rules.attention import Form

B, H, K, D = 2, 4, 2, 3


def drawn(steps, keys, dtype=jnp.float32, seed=0):
    shapes = (B, steps, H, D), (B, keys, K, D), (B, keys, K, D)
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def naive(q, k, v, *, causal=False, window=None, mask=None, bias=None, lengths=None, scale=None):
    """One query after the other, in NumPy and float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    y = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(q.shape[:3]):
        s = np.arange(k.shape[1])
        seen = np.ones(len(s), bool)
        if causal:
            seen &= s <= t
        if window is not None:
            seen &= (s >= t - window[0]) & (s <= t + window[1])
        if mask is not None:
            seen &= np.broadcast_to(mask, (B, H, q.shape[1], len(s)))[b, h, t]
        if lengths is not None:
            seen &= (s < lengths[1][b]) & (t < lengths[0][b])
        scores = k[b, :, h // (H // K)] @ q[b, t, h] * (scale or D**-0.5)
        if bias is not None:
            scores = scores + np.broadcast_to(bias, (B, H, q.shape[1], len(s)))[b, h, t]
        if seen.any():
            p = np.exp(scores[seen] - scores[seen].max())
            y[b, t, h] = p / p.sum() @ v[b, seen, h // (H // K)]
    return y


def draw(*shape):
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("steps", "keys", "options"), [
    (70, 70, {"causal": True}),
    (70, 131, {"window": (5, 2), "lengths": (np.array([70, 66]), np.array([9, 0]))}),
    (131, 7, {"mask": draw(B, 1, 131, 7) > 1, "bias": draw(H, 1, 7), "scale": 0.3}),
    (5, 5, {"causal": True, "lengths": (np.array([5, 3]), np.array([5, 3]))}),
    (5, 3, {"window": (1, 0), "mask": draw(1, H, 1, 3) > 0}),
])
def test_is_attention(steps, keys, options):
    q, k, v = drawn(steps, keys)
    got = jax.jit(lambda *x: ops.attention(*x, **options))(q, k, v)
    np.testing.assert_allclose(got, naive(q, k, v, **options), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("ad", [jax, fbprop], ids=["jax", "fbprop"])
def test_blocks_have_the_gradient_of_one_pass(ad):
    """Seventy queries are two blocks, the first sixty-four of them one, by plain code."""
    q, k, v = drawn(70, 64)
    bias = jnp.asarray(draw(1, H, 1, 64))
    dy = jnp.asarray(draw(B, 70, H, D))

    def loss(q, k, v, bias, steps):
        y = [ops.attention(q[:, i:j], k, v, bias=bias) for i, j in steps]
        return jnp.sum(jnp.concatenate(y, 1) * dy)

    grads = [jax.jit(ad.grad(lambda *x, s=s: loss(*x, s), argnums=(0, 1, 2, 3)))(q, k, v, bias)
             for s in ([(0, 70)], [(0, 35), (35, 70)])]
    for got, expected in zip(*grads):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [5, 70])
def test_what_is_padding_is_not_read(steps):
    q, k, v = drawn(steps, steps)
    n = jnp.array([steps - 2, 3])
    beyond = jnp.arange(steps) >= n[:, None]
    bad = [jnp.where(beyond[..., None, None], jnp.nan, a) for a in (q, k, v)]

    def loss(q, k, v):
        y = ops.attention(q, k, v, lengths=n)
        return jnp.sum(y**2), y

    (_, y), grads = jax.jit(fbprop.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*bad)
    expected = ops.attention(q, k, v, lengths=n)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for array in (y, *grads):
        assert jnp.isfinite(array).all()
        assert (jnp.where(beyond[..., None, None], array, 0) == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("steps", [5, 70])
def test_sixteen_bits(dtype, steps):
    q, k, v = drawn(steps, steps, dtype)
    grads = jax.jit(fbprop.grad(
        lambda *x: jnp.sum(ops.attention(*x, causal=True).astype(jnp.float32) ** 2),
        argnums=(0, 1, 2)))(q, k, v)
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    expected = jax.jit(jax.grad(
        lambda *x: jnp.sum(ops.attention(*x, causal=True) ** 2), argnums=(0, 1, 2)))(*wide)
    for got, e in zip(grads, expected):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32), e, atol=2e-2 * float(jnp.max(abs(e))))


OWN = "jax.nn.dot_product_attention"


@pytest.mark.parametrize(("steps", "heads", "options", "found"), [
    (70, K, {"is_causal": True}, True),
    (70, K, {"scale": 0.3}, True),
    (70, H, {"is_causal": True, "scale": 0.3}, True),
    (64, K, {"is_causal": True}, False),
    (70, K, {"mask": draw(1, 1, 70, 70) > 0}, False),
    (70, K, {"local_window_size": 3}, False),
])
def test_jax_own_attention_is_found_in_plain_code(steps, heads, options, found):
    """Longer than a block and without masks: as this operation; otherwise by its parts."""
    q, k, v = drawn(steps, steps)
    q = q[:, :, :heads]

    def loss(q, k, v):
        y = jax.nn.dot_product_attention(jnp.tanh(q), k, v, **options)
        return jnp.sum(jnp.sin(y))

    explained = fbprop.explain(loss, q, k, v, argnums=(0, 1, 2))
    assert (OWN in {line.rule for line in explained.lines}) == found
    both = jax.jit(lambda *x: [ad.value_and_grad(loss, (0, 1, 2))(*x) for ad in (fbprop, jax)])
    for got, expected in zip(*map(jax.tree.leaves, both(q, k, v))):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_an_override_of_a_part_reaches_into_jax_own_attention():
    q, k, v = drawn(70, 70)
    loss = lambda q: jnp.sum(jax.nn.dot_product_attention(q, k, v))
    none = fbprop.rule("exp", "y = eˣ;  x̄ = 0", x=lambda dy: None)
    rules = fbprop.table.override(none, fbprop.rule("div", "y = a / b; 0", a=None, b=None))
    explained = fbprop.explain(loss, q, rules=rules)
    assert OWN not in {line.rule for line in explained.lines}
    assert (fbprop.grad(loss, rules=rules)(q) == 0).all()


def test_dropout():
    """Leaves out shares, the same for one key; keeps the mean; its gradient is of what it left."""
    q, k, v = drawn(70, 70)
    run = lambda key, v: ops.attention(q, k, v, dropout=0.5, key=key)
    keys = jax.random.split(jax.random.key(0), 200)
    every = jax.jit(jax.vmap(run, (0, None)))(keys, v)
    assert not np.allclose(every[0], every[1])
    np.testing.assert_allclose(jax.jit(run)(keys[0], v), every[0], rtol=1e-5, atol=1e-6)
    mean, spread = every.mean(0), every.std(0) / 200**0.5
    assert (abs(mean - ops.attention(q, k, v)) < 5 * spread).mean() > 0.999
    # Linear in v: y(v) is its own derivative's.
    @jax.jit
    def returned(v):
        y, pullback = fbprop.vjp(lambda v: run(keys[0], v), v)
        return y, pullback(y)[0]

    y, dv = returned(v)
    np.testing.assert_allclose(jnp.vdot(dv, v), jnp.vdot(y, y), rtol=1e-5)


def test_empty_and_single():
    for q, k in (((0, 5, 2, 3), (0, 5, 2, 3)), ((2, 0, 2, 3), (2, 0, 2, 3)), ((2, 70, 2, 3),
                 (2, 0, 2, 3)), ((1, 1, 2, 3), (1, 1, 2, 3)), ((2, 70, 2, 0), (2, 70, 2, 0))):
        q, k = jnp.ones(q), jnp.ones(k)
        y, grads = jax.jit(lambda q, k: (ops.attention(q, k, k), fbprop.grad(
            lambda q, k: jnp.sum(ops.attention(q, k, k)), argnums=(0, 1))(q, k)))(q, k)
        assert y.shape == q.shape
        assert [g.shape for g in grads] == [q.shape, k.shape]
        assert all(jnp.isfinite(g).all() for g in (y, *grads))


def test_of_one_example():
    q, k, v = (a[0] for a in drawn(5, 5))
    many = ops.attention(q[None], k[None], v[None], lengths=jnp.array([3]))[0]
    np.testing.assert_array_equal(ops.attention(q, k, v, lengths=jnp.array(3)), many)


def test_large_scores_do_not_overflow():
    q, k, v = drawn(70, 70)
    y, grads = fbprop.value_and_grad(
        lambda q: jnp.sum(ops.attention(1e4 * q, k, v, causal=True)))(q)
    assert jnp.isfinite(y)
    assert jnp.isfinite(grads).all()


def test_keeps_no_scores():
    q, k, v = drawn(70, 70)
    found = fbprop.explain(lambda *x: ops.attention(*x, causal=True), q, k, v, argnums=(0, 1, 2))
    line = next(x for x in found.lines if x.rule == "attention")
    assert found.kept == sum(a.nbytes for a in (q, k, v, q)) + 4 * B * 70 * H
    assert line.formulation == ("by blocks of queries; not cuDNN: cuDNN takes 16-bit numbers, not "
                                "float32; not Pallas: the Pallas kernel takes multiples of 128 "
                                "queries and keys")


q, k, v = (jax.ShapeDtypeStruct((2, 5, n, 3), jnp.float32) for n in (4, 2, 2))


@pytest.mark.parametrize("steps", [5, 70])
def test_a_bias_of_minus_infinity_is_a_mask(steps):
    """Of left padding under a causal mask, too, where the first queries see nothing."""
    q, k, v = drawn(steps, steps)
    real = jnp.broadcast_to(jnp.arange(steps) >= 2, (1, 1, steps, steps))
    bias = jnp.where(real, 0.5, -jnp.inf)
    dy = draw(*q.shape[:3], v.shape[-1])
    run = lambda ad, **seen: ad.value_and_grad(
        lambda *x: jnp.sum(dy * ops.attention(*x, causal=True, **seen)), (0, 1, 2))(q, k, v)
    wanted, *found = jax.jit(lambda: [run(jax, mask=real)] + [
        run(ad, bias=bias) for ad in (jax, fbprop)])()
    for got, expected in zip(jax.tree.leaves(found), 2 * jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert (found[0][1][0][:, :2] == 0).all()


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"q": jnp.ones((2, 5))}, ValueError, r"takes q \[B, T, H, D\].*got \(2, 5\)"),
    ({"k": jnp.ones((2, 5, 2, 7))}, ValueError, "as many features per head"),
    ({"q": jnp.ones((2, 5, 3, 3))}, ValueError, "got 3 heads of queries expected a multiple of 2"),
    ({"q": jnp.ones((2, 5, 4, 3), jnp.bfloat16)}, TypeError, "one floating dtype, got bfloat16"),
    ({"mask": jnp.ones((5, 5))}, TypeError, "mask has dtype float32, expected bool"),
    ({"bias": jnp.ones((5, 5), bool)}, TypeError, "bias has dtype bool, expected floating"),
    ({"mask": jnp.ones((4, 5), bool)}, ValueError, r"mask broadcasts to \[B, H, T, S\]"),
    ({"window": -1}, ValueError, "got -1 expected two whole numbers from 0 on"),
    ({"window": 1.5}, ValueError, "got 1.5 expected two whole numbers"),
    ({"window": (1, 2, 3)}, ValueError, r"got \(1, 2, 3\) expected two whole numbers"),
    ({"dropout": 0.5, "key": 3}, ValueError, "attention draws by a single JAX key, got 3 exp"),
    ({"dropout": 1.0}, ValueError, r"got 1.0 expected a number in \[0, 1\)"),
    ({"dropout": 0.5}, ValueError, "got key=None expected a JAX key"),
    ({"lengths": jnp.ones(2)}, ValueError, r"got float32\[2\] expected int32\[2\]"),
    ({"lengths": jnp.ones(3, jnp.int32)}, ValueError, r"got int32\[3\] expected int32\[2\]"),
])
def test_says_what_is_wrong(change, error, message):
    given = {"q": jnp.ones(q.shape), "k": jnp.ones(k.shape), "v": jnp.ones(v.shape), **change}
    with pytest.raises(error, match=message):
        ops.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_the_kernel_of_tpus(monkeypatch):
    """Both passes of what JAX brings, interpreted, a head of keys for two of queries."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    made = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", made)
    q, k, v = (jnp.asarray(draw(1, 128, n, 8)) for n in (2, 1, 1))
    form = Form(0.3, causal=True)
    told = {"scale": form.scale, "causal": True, "window": None}

    def by_kernel(q, k, v):
        y, lse = kernels.splash_forward(q, k, v, **told)
        return y, kernels.splash_backward(q, k, v, y, lse, jnp.cos(q), **told)

    def by_parts(q, k, v):
        apart = lambda q, k, v: plain(q[:, :, None], k, v, form=form)[:, :, 0]
        y, pullback = jax.vjp(apart, q, k, v)
        return y, list(pullback(jnp.cos(q)))

    got, expected = jax.jit(lambda *x: (by_kernel(*x), by_parts(*x)))(q, k, v)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
