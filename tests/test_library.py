"""Library functions as users call them: jax.numpy, jax.nn, jax.scipy, jax.image, jax.lax.

Every row is differentiated by fbprop and by JAX on the same operands, to first and second order.
The rows in tests/cases say what each rule does; these say that nothing in the library is left out.
"""

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import pytest
from jax import lax

import fbprop
from cases.case import apart, between, booleans, complex_, definite, integers, positive, real
from fbprop.check import compare, random_cotangent
from fbprop.core.jaxcompat import differentiable

M, V, SQUARE = real(2, 3), real(5), real(3, 3)
UNIT = between(-0.9, 0.9, 2, 3)
Z, ZV = complex_(2, 3), complex_(5)

NUMPY = {
    "unary": [
        (name, (spec,))
        for spec, names in [
            (
                M,
                "sin cos tan sinh cosh tanh arctan arcsinh exp exp2 expm1 square sinc cbrt "
                "negative positive reciprocal deg2rad "
                "rad2deg nan_to_num ravel flip fliplr flipud rot90 "
                "transpose cumsum cumprod diff mean sum std var prod trace atleast_3d gradient",
            ),
            (UNIT, "arcsin arccos arctanh"),
            (positive(2, 3), "log log2 log10 log1p sqrt i0"),
            (
                apart(2, 3),
                "abs absolute fabs sign floor ceil round trunc rint max min ptp median "
                "sort argsort argmax nanmax nansum nanmean nanstd nanvar amax amin",
            ),
            (
                Z,
                "sin cos tan sinh cosh tanh exp log sqrt square abs angle real imag conj sum prod "
                "mean var std cumsum cumprod reciprocal expm1 log1p arcsin arccos arctan arcsinh "
                "arctanh",
            ),
        ]
        for name in names.split()
    ],
    "binary": [
        (name, (a, b))
        for a, b, names in [
            (
                M,
                positive(3),
                "add subtract multiply divide true_divide arctan2 hypot logaddexp "
                "logaddexp2 copysign maximum minimum fmax fmin",
            ),
            (positive(2, 3), M, "power float_power"),
            (between(3.2, 3.8, 2, 3), positive(3), "remainder mod fmod floor_divide"),
            (M, real(3, 4), "dot matmul"),
            (V, V, "inner vdot outer convolve correlate kron"),
            (M, M, "inner tensordot cross"),
            (real(2, 3), real(2, 3), "vecdot"),
            (Z, complex_(3), "add subtract multiply divide power"),
            (Z, complex_(3, 4), "matmul dot"),
            (ZV, ZV, "vdot inner outer convolve"),
        ]
        for name in names.split()
    ],
}

FUNCTIONS = {
    # indexing
    "x[i]": (lambda x: x[1], M),
    "x[..., None]": (lambda x: x[..., None, ::2], M),
    "x[::-1]": (lambda x: x[::-1, ::2], M),
    "x[-1:]": (lambda x: x[-1:], M),
    "x[array]": (lambda x: x[jnp.array([0, 0, 1])], M),
    "x[a, b]": (lambda x: x[jnp.array([0, 1]), jnp.array([2, 2])], M),
    "x[traced]": (lambda x, i: x[i], M, integers(0, 2)),
    "x[traced array]": (lambda x, i: x[i], V, integers(-5, 5, 7)),
    "x[:, mask]": (lambda x: x[:, np.array([True, False, True])], M),
    "at.set": (lambda x, y: x.at[1].set(y), M, real(3)),
    "at.add": (lambda x, y: x.at[jnp.array([0, 0])].add(y), M, M),
    "at.mul": (lambda x, y: x.at[0].mul(y), M, real(3)),
    "at.min": (lambda x, y: x.at[0].min(y), apart(2, 3), real(3)),
    "at.max": (lambda x, y: x.at[:, 1].max(y), apart(2, 3), real(2)),
    "at.get fill": (lambda x: x.at[jnp.array([0, 9])].get(mode="fill", fill_value=0.0), V),
    "take": (lambda x: jnp.take(x, jnp.array([[0, 2], [1, 1]]), axis=1), M),
    "take_along_axis": (lambda x: jnp.take_along_axis(x, jnp.array([[0], [2]]), 1), M),
    "segment_sum": (lambda x: jax.ops.segment_sum(x, jnp.array([0, 2, 0, 1, 2]), 3), real(5, 2)),
    "segment_max": (lambda x: jax.ops.segment_max(x, jnp.array([0, 2, 0, 1, 2]), 3), apart(5, 2)),
    "choose": (
        lambda x, y: jnp.choose(jnp.array([0, 1, 0]), [x, y], mode="clip"),
        real(3),
        real(3),
    ),
    "diag": (jnp.diag, SQUARE),
    "diagflat": (jnp.diagflat, V),
    "diagonal": (jnp.diagonal, M),
    "tril": (jnp.tril, SQUARE),
    "triu": (jnp.triu, SQUARE),
    "searchsorted": (lambda x, v: jnp.searchsorted(jnp.sort(x), v) + jnp.sum(v), V, V),
    # shape
    "reshape": (lambda x: x.reshape(3, -1), M),
    "swapaxes": (lambda x: x.swapaxes(0, 1), M),
    "moveaxis": (lambda x: jnp.moveaxis(x, 0, 2), real(2, 3, 5)),
    "concatenate": (lambda x, y: jnp.concatenate([x, y, x], 1), M, real(2, 5)),
    "stack": (lambda x, y: jnp.stack([x, y], 1), M, M),
    "hstack": (lambda x: jnp.hstack([x, x]), M),
    "split": (lambda x: jnp.split(x, [2, 3]), V),
    "array_split": (lambda x: jnp.array_split(x, 3), V),
    "tile": (lambda x: jnp.tile(x, (2, 2)), M),
    "repeat": (lambda x: jnp.repeat(x, 3, 1), M),
    "pad": (lambda x: jnp.pad(x, ((1, 2), (0, 1))), M),
    "pad edge": (lambda x: jnp.pad(x, 2, mode="edge"), M),
    "pad reflect": (lambda x: jnp.pad(x, 2, mode="reflect"), SQUARE),
    "pad wrap": (lambda x: jnp.pad(x, 2, mode="wrap"), SQUARE),
    "pad mean": (lambda x: jnp.pad(x, 1, mode="mean"), M),
    "roll": (lambda x: jnp.roll(x, 2, 1), M),
    "broadcast_to": (lambda x: jnp.broadcast_to(x, (4, 5)), V),
    "expand_dims": (lambda x: jnp.expand_dims(x, (0, 2)), V),
    "squeeze": (jnp.squeeze, real(1, 3, 1)),
    "block": (lambda x: jnp.block([[x, x], [x, 2.0 * x]]), M),
    "vander": (jnp.vander, V),
    "meshgrid": (lambda x, y: jnp.meshgrid(x, y), V, real(3)),
    "astype": (lambda x: x.astype("float32"), M),
    # reductions
    "sum where": (lambda x: jnp.sum(x, 1, where=jnp.array([True, False, True])), M),
    "mean axes": (lambda x: jnp.mean(x, (0, 2), keepdims=True), real(2, 3, 5)),
    "max axis": (lambda x: jnp.max(x, 1), apart(2, 3)),
    "prod zero": (lambda x: jnp.prod(x * jnp.arange(3.0), 1), M),
    "var ddof": (lambda x: jnp.var(x, 1, ddof=1), M),
    "average": (lambda x, w: jnp.average(x, 0, w), M, positive(2)),
    "quantile": (lambda x: jnp.quantile(x, 0.3), apart(5)),
    "percentile": (lambda x: jnp.percentile(x, 70, axis=1), apart(2, 5)),
    "norm": (jnp.linalg.norm, M),
    "norm 1": (lambda x: jnp.linalg.norm(x, 1), apart(2, 3)),
    "norm nuc": (lambda x: jnp.linalg.norm(x, "nuc"), M),
    "norm inf": (lambda x: jnp.linalg.norm(x, jnp.inf), apart(2, 3)),
    "corrcoef": (jnp.corrcoef, real(2, 7)),
    "cov": (jnp.cov, real(2, 7)),
    "interp": (lambda x, f: jnp.interp(x, jnp.arange(5.0), f), between(0.1, 3.9, 3), V),
    "polyval": (jnp.polyval, V, real(3)),
    "polyfit": (lambda y: jnp.polyfit(jnp.arange(5.0), y, 2), V),
    "trapezoid": (jnp.trapezoid, V),
    "ediff1d": (jnp.ediff1d, V),
    "unwrap": (jnp.unwrap, V),
    "where": (lambda c, x, y: jnp.where(c, x, y), booleans(2, 3), M, real(3)),
    "select": (
        lambda x, y: jnp.select([x > 0.0, y > 0.0], [x * y, y], x),
        apart(2, 3),
        apart(2, 3),
    ),
    "piecewise": (lambda x: jnp.piecewise(x, [x < 0.0, x >= 0.0], [jnp.sin, jnp.exp]), apart(5)),
    "clip": (lambda x: jnp.clip(x, -0.5, 0.6), apart(2, 3)),
    "einsum": (lambda x, y: jnp.einsum("ij,kj->ki", x, y), M, real(4, 3)),
    "einsum trace": (lambda x: jnp.einsum("iij->j", x), real(2, 2, 3)),
    "einsum three": (
        lambda x, y, z: jnp.einsum("ij,jk,kl->il", x, y, z),
        M,
        real(3, 4),
        real(4, 2),
    ),
    "apply_along_axis": (lambda x: jnp.apply_along_axis(jnp.cumsum, 1, x), M),
    "vectorize": (jnp.vectorize(lambda a, b: a @ b, signature="(n),(n)->()"), M, real(3)),
    # linear algebra
    "inv": (jnp.linalg.inv, definite(3)),
    "det": (jnp.linalg.det, SQUARE),
    "slogdet": (jnp.linalg.slogdet, definite(3)),
    "solve": (jnp.linalg.solve, definite(3), real(3)),
    "solve batched": (jnp.linalg.solve, definite(3, 2), real(2, 3, 2)),
    "lstsq": (lambda a, b: jnp.linalg.lstsq(a, b)[0], real(5, 3), real(5)),
    "pinv": (jnp.linalg.pinv, real(5, 3)),
    "matrix_power": (lambda x: jnp.linalg.matrix_power(x, 3), SQUARE),
    "cholesky": (jnp.linalg.cholesky, definite(3)),
    "eigh": (jnp.linalg.eigh, definite(3)),
    "eigvalsh": (jnp.linalg.eigvalsh, definite(3)),
    "svd values": (lambda x: jnp.linalg.svd(x, compute_uv=False), M),
    "qr": (jnp.linalg.qr, real(5, 3)),
    "expm": (jsp.linalg.expm, SQUARE),
    "multi_dot": (lambda x, y, z: jnp.linalg.multi_dot([x, y, z]), M, SQUARE, real(3, 5)),
    "solve_triangular": (
        lambda a, b: jsp.linalg.solve_triangular(a, b, lower=True),
        definite(3),
        real(3),
    ),
    "cho_solve": (
        lambda a, b: jsp.linalg.cho_solve(jsp.linalg.cho_factor(a + a.T), b),
        definite(3),
        real(3),
    ),
    "lu_solve": (
        lambda a, b: jsp.linalg.lu_solve(jsp.linalg.lu_factor(a), b),
        definite(3),
        real(3),
    ),
    "cg": (lambda a, b: jsp.sparse.linalg.cg(a, b, tol=1e-14)[0], definite(3), real(3)),
    # special functions
    **{
        name: (getattr(jsp.special, name), spec)
        for names, spec in [
            ("erf erfc i0e i1e i1 expit log_ndtr ndtr sinc", M),
            ("erfinv logit", between(0.1, 0.9, 2, 3)),
            ("gammaln digamma entr xlogy_", positive(2, 3)),
            ("ndtri", between(0.1, 0.9, 2, 3)),
        ]
        for name in names.split()
        if hasattr(jsp.special, name)
    },
    "logsumexp": (lambda x: jsp.special.logsumexp(x, 1), M),
    "logsumexp b": (lambda x, b: jsp.special.logsumexp(x, 1, b=b), M, positive(2, 3)),
    "xlogy": (jsp.special.xlogy, positive(2, 3), positive(2, 3)),
    "betaln": (jsp.special.betaln, positive(3), positive(3)),
    "gammainc x": (lambda x: jsp.special.gammainc(1.7, x), positive(3)),
    "polygamma": (lambda x: jsp.special.polygamma(jnp.asarray(1), x), positive(3)),
    "betainc x": (lambda x: jsp.special.betainc(1.2, 2.3, x), between(0.2, 0.8, 3)),
    "norm.logpdf": (jsp.stats.norm.logpdf, M),
    "gamma.logpdf": (lambda x: jsp.stats.gamma.logpdf(x, 2.0), positive(3)),
    "beta.logpdf": (lambda x: jsp.stats.beta.logpdf(x, 2.0, 3.0), between(0.2, 0.8, 3)),
    "t.logpdf": (lambda x: jsp.stats.t.logpdf(x, 3.0), V),
    "mvn": (
        lambda x, c: jsp.stats.multivariate_normal.logpdf(x, jnp.zeros(3), c),
        real(3),
        definite(3),
    ),
    # neural networks
    **{
        name: (getattr(jax.nn, name), apart(2, 3))
        for name in [
            "relu",
            "relu6",
            "elu",
            "selu",
            "celu",
            "silu",
            "gelu",
            "leaky_relu",
            "softplus",
            "soft_sign",
            "log_sigmoid",
            "sigmoid",
            "hard_tanh",
            "hard_sigmoid",
            "hard_silu",
            "softmax",
            "log_softmax",
            "standardize",
            "glu",
            "mish",
            "squareplus",
            "identity",
            "sparse_plus",
        ]
        if name != "glu"
    },
    "glu": (jax.nn.glu, real(2, 4)),
    "gelu exact": (lambda x: jax.nn.gelu(x, approximate=False), M),
    "softmax where": (
        lambda x: jax.nn.softmax(x, 0, where=jnp.array([[True] * 3, [True, False, True]])),
        M,
    ),
    "attention": (
        jax.nn.dot_product_attention,
        real(2, 3, 2, 4),
        real(2, 3, 2, 4),
        real(2, 3, 2, 4),
    ),
    "causal attention": (
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        real(2, 3, 2, 4),
        real(2, 3, 2, 4),
        real(2, 3, 2, 4),
    ),
    "dropout": (
        lambda x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.7, x.shape), x / 0.7, 0.0),
        M,
    ),
    # images and Fourier transforms
    "resize": (lambda x: jax.image.resize(x, (5, 7), "bilinear"), SQUARE),
    "resize cubic": (lambda x: jax.image.resize(x, (2, 4), "cubic"), SQUARE),
    "resize nearest": (lambda x: jax.image.resize(x, (5, 4), "nearest"), SQUARE),
    "resize lanczos": (lambda x: jax.image.resize(x, (4, 4), "lanczos3"), SQUARE),
    "map_coordinates": (
        lambda x, c: jsp.ndimage.map_coordinates(x, c, 1),
        SQUARE,
        between(0.1, 1.9, 2, 4),
    ),
    "fft": (jnp.fft.fft, Z),
    "ifft2": (jnp.fft.ifft2, Z),
    "rfft": (jnp.fft.rfft, V),
    "irfft": (lambda z: jnp.fft.irfft(z, 7), complex_(4)),
    "fftn": (jnp.fft.fftn, complex_(2, 3, 2)),
    "hfft": (jnp.fft.hfft, ZV),
    "fftshift": (jnp.fft.fftshift, V),
    "stft": (lambda x: jsp.signal.stft(x, nperseg=4)[2], real(13)),
    "convolve2d": (jsp.signal.convolve2d, SQUARE, real(2, 2)),
    "fftconvolve": (jsp.signal.fftconvolve, V, real(3)),
    "dct": (jsp.fft.dct, V),
    # control flow and lax
    "map": (lambda x: lax.map(jnp.sin, x), M),
    "fori": (lambda x: lax.fori_loop(0, 3, lambda i, c: c * x + i, x), V),
    "associative_scan": (lambda x: lax.associative_scan(jnp.multiply, x), V),
    "cummax": (lambda x: lax.cummax(x, 1), apart(2, 3)),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), M),
    "top_k": (lambda x: lax.top_k(x, 2)[0], apart(2, 5)),
    "batch_matmul": (lax.batch_matmul, real(2, 3, 5), real(2, 5, 2)),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 30), M),
    "conv": (lambda x, w: lax.conv(x, w, (1, 2), "SAME"), real(2, 3, 5, 5), real(2, 3, 2, 3)),
    "conv_transpose": (
        lambda x, w: lax.conv_transpose(
            x, w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        real(1, 3, 2),
        real(3, 2, 2),
    ),
    "pool": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "SAME"),
        apart(3, 5),
    ),
    "lgamma": (lax.lgamma, positive(3)),
    "rsqrt": (lax.rsqrt, positive(3)),
    "clamp": (lambda x: lax.clamp(-0.4, x, 0.6), apart(5)),
    "gamma sample": (lambda a: jax.random.gamma(jax.random.key(0), a), positive(3)),
    "categorical logits": (lambda x: jax.random.categorical(jax.random.key(0), x) + jnp.sum(x), M),
    "dirichlet": (lambda a: jax.random.dirichlet(jax.random.key(0), a), positive(3)),
    "beta sample": (lambda a: jax.random.beta(jax.random.key(0), a, 2.0), positive(3)),
    "multivariate_normal": (
        lambda c: jax.random.multivariate_normal(jax.random.key(0), jnp.zeros(3), c),
        definite(3),
    ),
    "hvp": (lambda x: jax.jvp(jax.grad(lambda y: jnp.sum(jnp.sin(y) ** 3)), (x,), (x,))[1], V),
    "jacfwd": (lambda x: jax.jacfwd(lambda y: jnp.sin(y) * y)(x), V),
    "jacrev": (lambda x: jax.jacrev(lambda y: jnp.cumsum(y**2))(x), V),
}

# JAX's attention multiplies in float32 whatever its operands are.
TOLERANCE = {"attention": 1e-6, "causal attention": 1e-6}

# Random derivatives in the shape parameter have no second derivative in JAX either.
FIRST_ORDER = {"gamma sample", "dirichlet", "beta sample"}


def rows():
    for kind, entries in NUMPY.items():
        for name, specs in entries:
            mark = "complex" if np.iscomplexobj(specs[0](np.random.default_rng(0))) else "real"
            yield f"{name}-{kind}-{mark}", getattr(jnp, name), specs
    for name, (fun, *specs) in FUNCTIONS.items():
        yield name, fun, tuple(specs)


@pytest.mark.parametrize(
    ("name", "fun", "specs"), [pytest.param(*r, id=r[0].replace(" ", "_")) for r in rows()]
)
def test_same_as_jax(name, fun, specs, x64):
    with jax.numpy_dtype_promotion("standard"):
        rng = np.random.default_rng(0)
        operands = tuple(jax.device_put(spec(rng)) for spec in specs)
        cotangent = random_cotangent(jax.eval_shape(fun, *operands))
        moving = [i for i, x in enumerate(operands) if differentiable(x)]

        def gradients(vjp, *values):
            full = list(operands)
            for i, v in zip(moving, values):
                full[i] = v
            return [vjp(fun, *full)[1](cotangent)[i] for i in moving]

        def both_orders(grad, vjp, *values):
            def length(g):  # weighted: a gradient of constant length still turns
                weights = jnp.arange(1.0, g.size + 1).reshape(g.shape)
                return jnp.sum(weights * (jnp.real(g) ** 2 + jnp.imag(g) ** 2 / 2))

            def norm(*values):
                return sum(map(length, gradients(vjp, *values)))

            first = gradients(vjp, *values)
            second = () if name in FIRST_ORDER else grad(norm, tuple(range(len(values))))(*values)
            return first, second

        values = [operands[i] for i in moving]
        # Of no arguments, so that XLA computes it while it compiles: see test_rules.py.
        expected, got = jax.jit(
            lambda: [both_orders(m.grad, m.vjp, *values) for m in (jax, fbprop)]
        )()
        close = TOLERANCE.get(name)
        for order, tolerance, a, b in zip((1, 2), (close or 1e-12, close or 1e-10), got, expected):
            found = (
                compare(tuple(values), tuple(a), tuple(b), f"order {order}", tolerance) if b else []
            )
            bad = [str(row) for row in found if not row.ok]
            assert not bad, "\n".join(bad)
