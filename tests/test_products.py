"""Products of operands of different types, by every algorithm, against JAX: values and dtypes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop.core import jaxcompat as jc

TYPES = "float32", "float16", "bfloat16", "float8_e4m3fn", "complex64", "int32"
GROUPS = np.array([1, 2], np.int32)


def ragged(x, w, **options):
    return lax.ragged_dot(x, jnp.stack([w, w]), GROUPS, **options)


def convolution(x, w, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x[None, :, None], w[None, None], (1, 1), "SAME", dimension_numbers=numbers, **options
    )


def depthwise(x, w, **options):
    x, w = (lax.broadcast_in_dim(a, (1, *a.shape, 3), (1, 2)) for a in (x, w))
    return lax.conv_general_dilated(
        x, w[0, :, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3, **options,
    )


def dot_general(x, w, **options):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), **options)


def einsum(x, w, **options):
    return jnp.einsum("ij,jk->ki", x, w, **options)


def made(shape, dtype, seed):
    """Small whole numbers: all their products and sums are exact in every type."""
    rng = np.random.default_rng(seed)
    value = rng.integers(-2, 3, shape)
    if dtype.startswith("complex"):
        value = value + 1j * rng.integers(-2, 3, shape)
    return jax.device_put(value.astype(jnp.dtype(dtype)))


def pairs(product, types, options):
    """((x, w), ȳ, types) for every pair of types that JAX takes the product of."""
    for a, b in itertools.product(types, types):
        x, w = made((3, 2), a, 0), made((2, 2), b, 1)
        if not jc.differentiable(x) and not jc.differentiable(w):
            continue
        try:
            y = jax.eval_shape(lambda x, w: product(x, w, **options), x, w)
        except (TypeError, ValueError):
            continue
        yield (x, w), made(y.shape, y.dtype.name, 2), (a, b)


def check(product, types=TYPES, **options):
    given = list(pairs(product, types, options))
    fun = lambda x, w: product(x, w, **options)

    @jax.jit
    def run(given):
        return [[floats(ad.vjp(fun, *p)[1](d)) for ad in (fbprop, jax)] for p, d in given]

    results = run([(p, d) for p, d, _ in given])
    for (ours, theirs), (*_, types) in zip(results, given):
        for x, y in zip(ours, theirs):
            assert x.dtype == y.dtype, types
            np.testing.assert_array_equal(x, y, err_msg=str(types))
    return len(given)


def floats(values):
    return [v for v in values if v.dtype != jax.dtypes.float0]


@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # JAX's ragged product
@pytest.mark.parametrize(("product", "preferred", "count"), [
    (dot_general, None, 35), (dot_general, "float32", 35), (dot_general, "complex64", 35),
    (ragged, None, 35), (convolution, None, 5), (convolution, "float32", 4), (depthwise, None, 5),
])
def test_products_of_all_pairs_of_types(product, preferred, count):
    assert check(product, preferred_element_type=preferred) == count


def test_numpys_products_of_all_pairs_of_types():
    with jax.numpy_dtype_promotion("standard"):
        assert check(einsum) == 27


def test_operands_of_twice_the_precision(x64):
    assert check(dot_general, ("float64", "complex64", "complex128")) == 9


ALGORITHMS = [a for a in lax.DotAlgorithmPreset if jc.cpu_has(a)]


def test_products_by_every_algorithm(x64):
    assert len(ALGORITHMS) == 7
    given = [
        (functools.partial(product, precision=algorithm), (x, w), made((3, 2), x.dtype.name, 2))
        for x, w in [(made((3, 2), t, 0), made((2, 2), t, 1)) for t in ("float32", "bfloat16")]
        for algorithm in [*ALGORITHMS, "highest"] for product in (dot_general, ragged)
    ]
    found = jax.jit(
        lambda: [[ad.vjp(f, *p)[1](d) for ad in (fbprop, jax)] for f, p, d in given]
    )()
    for ours, theirs in found:
        for x, y in zip(ours, theirs):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def precisions(jaxpr):
    """Of every product in a jaxpr: (shape of either factor, precision)."""
    for eqn in jc.open_jaxpr(jaxpr).eqns:
        if "precision" in eqn.params:
            yield [v.aval.shape for v in eqn.invars[:2]], eqn.params["precision"]
        for _, inner in jc.sub_jaxprs(eqn.params):
            yield from precisions(inner)


ONE_EACH = lax.DotAlgorithm(jnp.float16, jnp.bfloat16, jnp.float32, 1, 2, 1, False)
OTHER = lax.DotAlgorithm(jnp.bfloat16, jnp.float16, jnp.float32, 2, 1, 1, False)


@pytest.mark.parametrize("numbers", [(((1,), (0,)), ((), ())), (((0,), (1,)), ((), ()))])
@pytest.mark.parametrize(("precision", "other"), [
    ((lax.Precision.HIGH, lax.Precision.DEFAULT), (lax.Precision.DEFAULT, lax.Precision.HIGH)),
    (ONE_EACH, OTHER),
])
def test_an_operand_keeps_its_precision_when_it_changes_places(numbers, precision, other):
    x, w = (jnp.ones((3, 2)), jnp.ones((2, 5)))[:: 1 if numbers[0][0] == (1,) else -1]

    def both(x, w, dy):
        return fbprop.vjp(lambda *p: lax.dot_general(*p, numbers, precision=precision), x, w)[1](dy)

    dy = lax.dot_general(x, w, numbers)
    (_, _), *products = precisions(jax.make_jaxpr(both)(x, w, dy))
    assert len(products) == 2
    for shapes, got in products:
        first, second = (shape == dy.shape for shape in shapes)
        kept = shapes[first]
        place = 1 if kept == w.shape else 0  # of the kept operand, in the product forward
        assert first != second
        assert got == (precision if place == first else other)


@pytest.mark.parametrize("name", ["high", "highest"])
def test_precision_of_a_context_holds_backward(name):
    def loss(x, w):
        with jax.default_matmul_precision(name):
            return jnp.sum((x @ w) ** 2)

    x = jnp.ones((2, 2))
    found = [p for _, p in precisions(jax.make_jaxpr(fbprop.grad(loss, (0, 1)))(x, x))]
    assert found == [(lax.Precision(name),) * 2] * 3


def test_attention_in_float16_without_its_algorithm():
    """JAX tries one that CPUs lack, and does without."""
    q, k, v = (jnp.asarray(made((1, 3, 2, 2), "float16", seed)) for seed in range(3))
    loss = lambda q, k, v: jnp.sum(jax.nn.dot_product_attention(q, k, v).astype("float32") ** 2)
    for argnums in (2, (0, 1, 2)):  # the algorithm is asked for outside and inside of derivatives
        with jax.numpy_dtype_promotion("standard"):
            ours, theirs = (ad.grad(loss, argnums)(q, k, v) for ad in (fbprop, jax))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match="not supported by dot_general on CPU"),
    ):
        jax.jit(fbprop.grad(loss))(q, k, v)  # as JAX's
