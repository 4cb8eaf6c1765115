"""The smaller operations: values, what they keep, types, special points, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import ops

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)

KEY = jax.random.key(1)
CLASSES = jnp.array([5, 0, 2, 2])


def kept(function, *operands):
    found = fbprop.explain(function, *operands, argnums=tuple(range(len(operands))))
    return found.kept // 4


@pytest.mark.parametrize(("function", "operands", "numbers"), [
    (lambda x, s, b: ops.layer_norm(x, s, b), (X, X[0], X[0]), 24 + 6 + 2 * 4),
    (lambda x, s: ops.rms_norm(x, s), (X, X[0]), 24 + 6 + 2 * 4),
    (lambda x: ops.group_norm(x, groups=2), (X,), 24 + 2 * 4 * 2),
    (lambda x, s, b: ops.batch_norm(x, s, b)[0], (X, X[0], X[0]), 24 + 6 + 2 * 6),
    (ops.gelu, (X,), 24), (ops.silu, (X,), 24), (ops.swiglu, (X, X), 48), (ops.geglu, (X, X), 48),
    (lambda x, w, b: ops.dense(x, w, b, activation="gelu"), (X, X.T, X[0, :4]), 24 + 24 + 16),
    (lambda x, w: ops.dense(x, w), (X, X.T), 48),
    (lambda x: ops.softmax_cross_entropy(x, CLASSES), (X,), 24 + 4 + 4),
    (ops.softmax_cross_entropy, (X, X), 48 + 4), (ops.sigmoid_cross_entropy, (X, X), 48),
    (ops.huber, (X, X), 48), (lambda x: ops.dropout(x, 0.5, KEY), (X,), 24 / 4 + 2),
])
def test_keeps_what_its_docstring_says(function, operands, numbers):
    assert kept(function, *operands) == numbers


@pytest.mark.parametrize(("got", "expected"), [
    (lambda x: ops.gelu(x), jax.nn.gelu),
    (lambda x: ops.gelu(x, approximate=False), lambda x: jax.nn.gelu(x, approximate=False)),
    (ops.silu, jax.nn.silu),
    (lambda x: ops.swiglu(x, x + 1), lambda x: jax.nn.silu(x) * (x + 1)),
    (lambda x: ops.geglu(x, x + 1, approximate=False),
     lambda x: jax.nn.gelu(x, approximate=False) * (x + 1)),
    (lambda x: ops.dense(x, X.T, X[0, :4], activation="sigmoid"),
     lambda x: jax.nn.sigmoid(x @ X.T + X[0, :4])),
    (lambda x: ops.dense(x, X.T), lambda x: x @ X.T),
    (lambda x: ops.layer_norm(x, residual=2 * x)[0], lambda x: ops.layer_norm(3 * x)),
    (lambda x: ops.rms_norm(x, residual=2 * x)[1], lambda x: 3 * x),
    (lambda x: ops.batch_norm(x)[1], lambda x: jnp.mean(x, 0)),
    (lambda x: ops.batch_norm(x)[2], lambda x: jnp.var(x, 0)),
])
def test_value_and_gradient(got, expected):
    """Also of the statistics that batch norm returns."""
    def both(x):
        dy = jnp.cos(jnp.arange(expected(x).size, dtype=x.dtype)).reshape(expected(x).shape)
        return [ad.value_and_grad(lambda x: jnp.sum(f(x) * dy))(x)
                for ad, f in ((jax, expected), (jax, got), (fbprop, got))]

    wanted, *found = jax.jit(both)(X)
    for each in found:
        for a, b in zip(each, wanted):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_layer_norm_of_many_rows():
    """2,050 rows of 256 are passed back 256 at a time, and a rest of 2."""
    x = jnp.tile(X.reshape(-1), 25000)[:2050 * 256].reshape(2050, 256)
    x = x * jnp.linspace(0.1, 3, 2050)[:, None]
    scale = jnp.linspace(-1, 1, 256)

    def loss(norm):
        return lambda x, s: jnp.sum(norm(x, s) * jnp.sin(3 * x))

    def plain(x, s):
        centred = x - jnp.mean(x, -1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * s

    grads = jax.jit(lambda x, s: (fbprop.grad(loss(ops.layer_norm), (0, 1))(x, s),
                                  jax.grad(loss(plain), (0, 1))(x, s)))(x, scale)
    for got, expected in zip(*grads):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * float(jnp.max(expected)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits(dtype):
    low = X.astype(dtype)
    functions = (ops.layer_norm, ops.rms_norm, lambda x: ops.group_norm(x, groups=3),
                 lambda x: ops.batch_norm(x)[0], ops.gelu, ops.silu, lambda x: ops.swiglu(x, x),
                 lambda x: ops.dense(x, X.T.astype(x.dtype), activation="relu"))

    def gradient(function, x):
        # Not of squares: of what is standardised they add up to a constant.
        return fbprop.grad(lambda x: jnp.sum(jnp.sin(3 * function(x).astype(jnp.float32))))(x)

    for y, got, expected in jax.jit(lambda x: [
        (f(x), gradient(f, x), gradient(f, x.astype(jnp.float32))) for f in functions
    ])(low):
        assert y.dtype == got.dtype == dtype
        atol = 3e-2 * max(1, float(np.max(abs(expected))))
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=atol)


def test_statistics_are_exact_far_from_zero():
    x = X + 1e4
    exact = np.var(np.asarray(x, np.float64), 0)
    np.testing.assert_allclose(ops.batch_norm(x)[2], exact, rtol=1e-4)
    np.testing.assert_allclose(ops.layer_norm(x), ops.layer_norm(x - 1e4), atol=3e-3)


OWN_BROADCASTING = {
    "batch_norm": lambda x: ops.batch_norm(x, jnp.ones(4), jnp.ones(4))[0],
    "layer_norm": lambda x: ops.layer_norm(x, jnp.ones(4), jnp.ones(4)),
    "dense": lambda x: ops.dense(x, jnp.ones((4, 3)), jnp.ones(3), activation="gelu"),
    "dense as it is": lambda x: ops.dense(x, jnp.ones((4, 3)), jnp.ones(3)),
    "padded attention": lambda x: ops.attention(x, x, x, lengths=jnp.array([1, 2])),
    "attention": lambda x: ops.attention(x, x, x, bias=jnp.ones((2, 2)), causal=True, window=1),
    "rotary": lambda x: ops.rotary(x, jnp.arange(2)),
}


@pytest.mark.parametrize("name", OWN_BROADCASTING)
def test_ranks_are_promoted_within_operations(name):
    loss = lambda x: jnp.sum(OWN_BROADCASTING[name](x))
    with jax.numpy_rank_promotion("raise"):
        for ad in (fbprop, jax):
            assert jax.eval_shape(ad.grad(loss), jnp.ones((2, 2, 3, 4))).shape == (2, 2, 3, 4)


def test_losses_at_the_ends():
    """Logits of 1e4, ±inf, float16, labels outside, no examples; the same under both."""
    inf, nan = float("inf"), float("nan")
    z = jnp.array([[1e4, 0.0, -1e4], [0.0, -inf, 0.0], [-inf, 0.0, 0.0], [0.0, 0.0, 0.0]])
    shares = jnp.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    log2 = float(jnp.log(2.0))
    for ad in (fbprop, jax):
        for labels, last in ((jnp.array([1, 0, 0, -1], jnp.int8), nan), (shares, 0)):
            loss, dz = ad.value_and_grad(
                lambda z, y=labels: (jnp.sum(w := ops.softmax_cross_entropy(z, y)), w),
                has_aux=True)(z)
            np.testing.assert_allclose(loss[1], [1e4, log2, inf, last])
            np.testing.assert_allclose(dz[:1], [[1, -1, 0]])
            np.testing.assert_allclose(dz[2], [-1, 0.5, 0.5])
        loss, dz = jax.vmap(ad.value_and_grad(ops.sigmoid_cross_entropy), (0, 0))(
            jnp.array([1e4, inf, -inf, -inf, 0]), jnp.array([0.0, 1.0, 0.0, 1.0, 0.5]))
        np.testing.assert_allclose(loss, [1e4, 0, 0, inf, log2])
        np.testing.assert_allclose(dz, [1, 0, 0, -1, 0])
        half = jnp.array([300.0, -300.0, 0.0], jnp.float16)
        loss, dx = jax.vmap(ad.value_and_grad(ops.huber), (0, None))(half, jnp.float16(0))
        assert (loss.dtype, dx.dtype) == (jnp.float32, jnp.float16)
        np.testing.assert_allclose(loss, [299.5, 299.5, 0])
        np.testing.assert_allclose(dx, [1, -1, 0])
        many = ad.grad(lambda z: ops.softmax_cross_entropy(z, jnp.uint8(255)))(jnp.zeros(600))
        assert many[255] < 0 < many[511]
        none = ad.grad(lambda z: jnp.sum(ops.softmax_cross_entropy(z, jnp.zeros(0, int))))
        assert none(jnp.ones((0, 3))).shape == (0, 3)


def test_dropout_is_that_of_its_key():
    """Also where it is drawn again, in a batch with a key each, and of a key without a type."""
    stays = jax.random.bernoulli(KEY, 0.7, X.shape)
    broken = jnp.where(stays, X, jnp.nan)
    y, pullback = fbprop.vjp(lambda x: ops.dropout(x, 0.3, KEY), broken)
    np.testing.assert_array_equal(y, jnp.where(stays, X / 0.7, 0))
    np.testing.assert_array_equal(pullback(X)[0], y)
    np.testing.assert_allclose(jax.jvp(pullback, (broken,), (X,))[1][0], y, 1e-6)
    np.testing.assert_array_equal(ops.dropout(X, 0.3, jax.random.key_data(KEY)), y)
    keys = jax.random.split(KEY, 4)
    mapped = lambda ad: jax.vmap(ad.value_and_grad(
        lambda x, key: jnp.sum(ops.dropout(x, 0.3, key) * x)))(X, keys)
    each = [jax.random.bernoulli(key, 0.7, (6,)) for key in keys]
    for ad in (fbprop, jax):
        np.testing.assert_allclose(mapped(ad)[1], jnp.where(jnp.stack(each), 2 * X / 0.7, 0), 1e-6)
    assert ops.dropout(X, 0, None) is X
    found = fbprop.explain(lambda x: ops.dropout(x, 0.3, KEY), X, platform="tpu")
    assert "drawn again" in str(found)


def test_constant_and_empty():
    ones = jnp.ones((2, 6))
    for function in (ops.layer_norm, lambda x: ops.batch_norm(x)[0]):
        y, dx = jax.jit(fbprop.value_and_grad(lambda x, f=function: jnp.sum(f(x))))(ones)
        assert y == 0
        assert (dx == 0).all()
    for shape in ((0, 6), (2, 0), (2, 3, 0, 4)):
        for function in (ops.layer_norm, ops.rms_norm, lambda x: ops.batch_norm(x)[0], ops.gelu):
            dx = jax.jit(fbprop.grad(lambda x, f=function: jnp.sum(f(x))))(np.ones(shape))
            assert dx.shape == shape


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: ops.layer_norm(jnp.ones((2, 3)), jnp.ones(2)), ValueError,
     r"scale of layer_norm has shape \(2,\), expected \(3,\)"),
    (lambda: ops.rms_norm(jnp.ones((2, 3), int)), TypeError, r"rms_norm takes floating numbers"),
    (lambda: ops.layer_norm(jnp.ones((2, 3)), residual=jnp.ones(3)), ValueError,
     r"adds residual to x, got shape \(3,\) expected \(2, 3\)"),
    (lambda: ops.group_norm(jnp.ones((2, 3)), groups=2), ValueError, "got groups=2 expected a div"),
    (lambda: ops.gelu(jnp.ones(2, int)), TypeError, "gelu takes floating numbers, got int32"),
    (lambda: ops.swiglu(jnp.ones(2), jnp.ones(3)), ValueError,
     r"swiglu multiplies arrays of one shape and dtype, got float32\[2\] and float32\[3\]"),
    (lambda: ops.softmax_cross_entropy(X, CLASSES[:3]), ValueError,
     r"softmax_cross_entropy got labels or targets of shape \(3,\) expected \(4,\)"),
    (lambda: ops.sigmoid_cross_entropy(CLASSES, CLASSES), TypeError,
     "sigmoid_cross_entropy takes floating numbers, got int32"),
    (lambda: ops.huber(X, X[0]), ValueError, r"huber got .* shape \(6,\) expected \(4, 6\)"),
    (lambda: ops.huber(X, X, delta=0.0), ValueError, "got delta=0.0 expected one above 0"),
    (lambda: ops.dropout(CLASSES, 0.5, KEY), TypeError, "dropout takes floating numbers, got int"),
    (lambda: ops.dropout(X, 1.0, KEY), ValueError, r"got 1.0 expected a number in \[0, 1\)"),
    (lambda: ops.dropout(X, 0.5, None), ValueError, "got key=None expected a JAX key"),
    (lambda: ops.dropout(X, 0.5, 3), ValueError, "dropout draws by a single JAX key, got 3 exp"),
    (lambda: ops.dropout(X, 0.5, jax.random.split(KEY)), ValueError, r"got key<fry>\[2\] expected"),
    (lambda: ops.dense(X, X), ValueError, r"got float32\[4, 6\] and float32\[4, 6\]"),
    (lambda: ops.dense(X, X.T, X[0]), ValueError, r"bias has shape \(6,\), expected \(4,\)"),
    (lambda: ops.dense(X, X.T, activation="elu"), ValueError, "one of 'gelu'.*got 'elu'"),
])
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
