"""`jax.experimental.sparse`, and what else of jax.experimental has derivatives: equal to JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import sparse
from jax.experimental.buffer_callback import buffer_callback
from jax.experimental.pallas import pallas_call
from jax.experimental.scheduling_groups import scheduling_group
from jax.experimental.xla_metadata import set_xla_metadata

import fbprop

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype("float32")


D = np.where(RNG.random((5, 3)) < 0.5, normal(5, 3), np.float32(0))
AT, NSE = np.argwhere(D), 15  # where it is not 0; as many as it could be
ROW, COL = AT.T
STARTS = np.append(0, np.cumsum(np.count_nonzero(D, 1)))
TURNED = np.lexsort((ROW, COL))
BCOO = sparse.BCOO((D[ROW, COL], AT), shape=(5, 3), unique_indices=True)
OTHER = sparse.BCOO((normal(4), np.array([[0, 2], [1, 1], [1, 2], [4, 0]])), shape=(5, 3))
BATCH = sparse.BCOO((normal(2, 3), np.stack([AT[:3], AT[1:4]])), shape=(2, 5, 3))
BLOCKS = sparse.BCOO((normal(len(AT), 2), AT), shape=(5, 3, 2))
BCSR = sparse.BCSR((D[ROW, COL], COL, STARTS), shape=(5, 3))
COO = sparse.COO((D[ROW, COL], ROW, COL), shape=(5, 3))
CSR = sparse.CSR((D[ROW, COL], COL, STARTS), shape=(5, 3))
CSC = sparse.CSC(
    (D.T[D.T != 0], ROW[TURNED], np.append(0, np.cumsum(np.count_nonzero(D, 0)))), shape=(5, 3)
)
BANDS = np.array([4.0, 1.0, 0.5, 4.0, 1.0, 0.5, 4.0], "float32")  # of a matrix [3, 3]
BAND_COLUMNS, BAND_STARTS = np.array([0, 1, 0, 1, 2, 1, 2]), np.array([0, 2, 5, 7])
X, Y, XS = normal(3), normal(5), normal(3, 2)
DOT = (((1,), (0,)), ((), ()))
BATCHED = (((2,), (1,)), ((0,), (0,)))


def like(matrix):
    """The matrix with other data."""
    if isinstance(matrix, sparse.BCSR):
        return lambda d: sparse.BCSR((d, matrix.indices, matrix.indptr), shape=matrix.shape)
    if isinstance(matrix, sparse.BCOO):
        return lambda d: sparse.BCOO((d, matrix.indices), shape=matrix.shape)
    at = (matrix.row, matrix.col) if isinstance(matrix, sparse.COO) else (
        matrix.indices, matrix.indptr)
    return lambda d: type(matrix)((d, *at), shape=matrix.shape)


bcoo, other, bcsr, batch, blocks = map(like, (BCOO, OTHER, BCSR, BATCH, BLOCKS))


def again(d, x):
    """A loop whose body multiplies, made again backward."""
    step = jax.checkpoint(lambda c, _: (jnp.sin(bcoo(d).T @ (bcoo(d) @ c)), None))
    return lax.scan(step, x, None, length=2)[0]


def chain(d, e):
    """Elementwise, concatenated, cut, turned, summed: what is made of the primitives here."""
    both = sparse.bcoo_concatenate([bcoo(d) * 2.0 - other(e), bcoo(d)], dimension=0)
    return jnp.sin(both[1:8].T.sum(0).todense())


def products(matrix):
    """Both ways, with a vector and a matrix."""
    make = like(matrix)
    both = lambda d, x, y, xs: (make(d).T @ (make(d) @ x + y), make(d) @ xs)
    return both, matrix.data, X, Y, XS


# name: (function of float arrays, the arrays)
CASES = {
    "bcoo": products(BCOO),
    "bcsr": (lambda d, x, xs: (bcsr(d) @ x, bcsr(d) @ xs), BCSR.data, X, XS),
    "coo": products(COO),
    "csr": products(CSR),
    "csc": products(CSC),
    "from the right": (lambda d, y: y @ bcoo(d), BCOO.data, Y),
    "todense": (
        lambda d: jnp.sin(sum(make(d).todense() for make in (bcoo, bcsr, like(COO), like(CSR)))),
        BCOO.data,
    ),
    "fromdense": (
        lambda x: jnp.sin(sum(
            kind.fromdense(x, nse=NSE).data
            for kind in (sparse.BCOO, sparse.BCSR, sparse.COO, sparse.CSR)
        )),
        D,
    ),
    "extract": (
        lambda x: sparse.bcoo_extract(BCOO, x) @ X
        + jnp.sum(sparse.bcsr_extract(BCSR.indices, BCSR.indptr, x)),
        D,
    ),
    "sampled": (
        lambda a, b: sparse.bcoo_dot_general_sampled(a, b, BCOO.indices, dimension_numbers=DOT),
        normal(5, 2), normal(2, 3),
    ),
    "batched": (
        lambda d, x: sparse.bcoo_dot_general(batch(d), x, dimension_numbers=BATCHED),
        BATCH.data, normal(2, 3, 2),
    ),
    "blocks": (
        lambda d: sparse.bcoo_transpose(blocks(d), permutation=(1, 0, 2)).todense(), BLOCKS.data
    ),
    "chain": (chain, BCOO.data, OTHER.data),
    "times": (
        lambda d, e, x: ((bcoo(d) * x).todense(),
                         sparse.bcoo_multiply_sparse(bcoo(d), other(e)).data),
        BCOO.data, OTHER.data, normal(5, 3),
    ),
    "duplicates": (
        lambda d: sparse.BCOO((d, np.zeros((BCOO.nse, 2), int)), shape=(5, 3))
        .sum_duplicates(nse=2).sort_indices().data,
        BCOO.data,
    ),
    "vmap": (jax.vmap(lambda d, x: bcoo(d) @ x, in_axes=(None, 1)), BCOO.data, XS),
    "loop": (again, BCOO.data, X),
    "sparsify": (
        lambda d, y: sparse.sparsify(lambda a, y: jnp.sin((a * a + a).T @ y))(bcoo(d), y),
        BCOO.data, Y,
    ),
    "spsolve": (
        lambda d, b: sparse.linalg.spsolve(d, BAND_COLUMNS, BAND_STARTS, b), BANDS, X
    ),
    "todense of either": (lambda d, x: sparse.todense(bcoo(d)) + sparse.todense(x), BCOO.data, D),
}
TWICE = ("bcoo", "extract", "sampled", "todense")


def cotangents(vjp, grad):
    """Of every case at ȳ = y + 1, and of the sum of squares of some of these."""

    def pulled(fun, *operands):
        y, pullback = vjp(fun, *operands)
        return pullback(jax.tree.map(lambda y: y + 1, y))

    def twice(fun, *operands):
        def squares(*operands):
            return sum(jnp.sum(d * d) for d in pulled(fun, *operands))

        return grad(squares, tuple(range(len(operands))))(*operands)

    def run(operands):
        found = {name: pulled(CASES[name][0], *a) for name, a in operands.items()}
        return found | {f"{n}, twice": twice(CASES[n][0], *operands[n]) for n in TWICE}

    return run


def test_equal_to_jax():
    ours, theirs = cotangents(fbprop.vjp, fbprop.grad), cotangents(jax.vjp, jax.grad)
    both = jax.jit(lambda operands: (ours(operands), theirs(operands)))
    got, expected = both({name: operands for name, (_, *operands) in CASES.items()})
    for name, ds in expected.items():
        assert len(got[name]) == len(ds) > 0
        for d, e in zip(got[name], ds):
            np.testing.assert_allclose(d, e, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_sparse_matrix_is_an_argument():
    def cotangent(vjp):
        return vjp(lambda a, x: (a[0] @ x, a[1] @ x), (BCOO, BCSR), X)[1]((Y, Y))

    got, expected = cotangent(fbprop.vjp), cotangent(jax.vjp)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for d, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert (d.dtype, d.shape) == (e.dtype, e.shape)
        if d.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(d, e, rtol=1e-6)


def test_what_jax_cannot_go_back_through_is_an_error_here_too():
    product = lambda d: jnp.sum((bcoo(d).T @ OTHER).todense())
    for grad in (jax.grad, fbprop.grad):
        with pytest.raises(NotImplementedError, match="bcoo_spdot_general"):
            jax.eval_shape(grad(product), BCOO.data)


def test_how_and_where_operations_run():
    def fun(x):
        y = scheduling_group(name="group")(lambda x: jnp.sin(x) * x)(x)
        return jnp.sum(set_xla_metadata(y * x, name="value"))

    got, expected = jax.jit(lambda x: (fbprop.grad(fun)(x), jax.grad(fun)(x)))(X)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def kernel(x, y):
    y[...] = jnp.sin(x[...])


@pytest.mark.parametrize(("what", "fun"), [
    ("Pallas kernels", lambda x: pallas_call(kernel, out_shape=jax.typeof(x), interpret=True)(x)),
    ("Buffer callbacks", lambda x: buffer_callback(lambda *_: None, jax.typeof(x))(x)),
])
def test_code_that_is_not_jax_has_no_derivative(what, fun):
    with pytest.raises(ValueError, match=f"{what} have no .* got .* jax.custom_vjp"):
        fbprop.grad(lambda x: jnp.sum(fun(x)))(X)


def test_real_data_times_a_complex_vector_has_a_real_cotangent():
    pull = lambda vjp: vjp(lambda d, x: bcoo(d) @ x, BCOO.data, X + 1j * X)[1](Y + 2j * Y)
    with jax.numpy_dtype_promotion("standard"):
        (got, dx), (expected, dx_expected) = pull(fbprop.vjp), pull(jax.vjp)
    assert got.dtype == "float32"
    np.testing.assert_allclose(got, expected.real, rtol=1e-5)
    np.testing.assert_allclose(dx, dx_expected, rtol=1e-5)
