"""Products of operands of different types, by every algorithm, against JAX: values and dtypes."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop.core.jaxcompat import differentiable

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
    return jnp.asarray(value).astype(dtype)


def pairs(product, types, options):
    """((x, w), ȳ, types) for every pair of types that JAX takes the product of."""
    for a, b in itertools.product(types, types):
        x, w = made((3, 2), a, 0), made((2, 2), b, 1)
        if not differentiable(x) and not differentiable(w):
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
@pytest.mark.parametrize("product, preferred, count", [
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
