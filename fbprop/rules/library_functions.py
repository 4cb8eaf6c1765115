"""Rules for library functions as wholes, used where `fbprop.core.library` proves that it is they.

A rule for the whole keeps less than the rules of its parts do, and is a handle for overrides:
guided backpropagation is another rule for ``jax.nn.relu``.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from fbprop.core import jaxcompat as jc
from fbprop.core.devices import at_lowering, by_platform, in_words
from fbprop.core.factored import Rows
from fbprop.core.precision import at_least_float32
from fbprop.core.rule import Pullbacks, Rule, Step, broadcasting, elementwise
from fbprop.rules.cumulative import below
from fbprop.rules.direction import direction

LONGEST = 4096  # row of a softmax that a GPU's kernel takes as a whole
FAR = 40.0  # from here on Φ is 0 or 1 in float64
GELU_SLOPE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715  # of jax.nn.gelu(approximate=True)


def gelu_pullback(dy, x, *, approximate):
    """By erf, where the forward pass has erfc: two things to XLA, which then keeps neither.

    tanh as the forward pass has it: where both are compiled as one it is not computed again, which
    takes 1.6 times as long at 512 x 1024. Far from 0, where the slope of Φ is 0, x is cut off, lest
    its square be infinite (in float16, from 256 on) and the product nan.
    """
    near = jnp.clip(x, -FAR, FAR)
    if approximate:
        t = jnp.tanh(GELU_SLOPE * (x + GELU_CUBE * x**3))
        p, slope = 0.5 + 0.5 * t, 0.5 * (1 - t) * (1 + t) * GELU_SLOPE
        slope = slope * (1 + 3 * GELU_CUBE * near * near)
    else:
        p = 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))
        slope = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return dy * (p + near * slope)


def silu_pullback(dy, x):
    s = lax.logistic(x)
    x = jnp.clip(x, -1000, 1000)  # there σ is 0 or 1 in every precision, and ∞ · 0 is nan
    return dy * (s + x * s * (1 - s))


def _softmax(dy, out, *, axis):
    """What is 0 has no slope, whatever reaches it: of -inf among x, the cotangent may be infinite.

    XLA's fused sums on CPUs take no select: masked before the sum, 512 x 1024 take 1.26 of
    `jax.grad`'s time and 2 MB. So it is summed as it stands, and again if that is not finite.
    """
    # Minus before the sum: XLA CPU has a fused form of a difference with a sum, 1.1 times as slow.
    minus_sum = lambda dy, out: -jnp.sum(dy * out, axis, keepdims=True)
    again = lambda dy, out: minus_sum(_where_positive(out, dy), out)

    def if_need_be(dy, out):
        total = minus_sum(dy, out)
        finite = jnp.all(jnp.isfinite(total))
        total = lax.cond(finite, lambda *_: total, again, dy, out)
        return _where_positive(out, out * (dy + total))

    return by_platform(dy, out, cpu=if_need_be, **_masked_softmax(out, axis))


def _masked_softmax(out, axis):
    """How it is done elsewhere: on NVIDIA GPUs, and by default."""
    def masked(dy, out):
        product = _where_positive(out, _where_positive(out, dy) * out)
        total = _once_on_tpu(jnp.sum(product, axis, keepdims=True))
        return out * _where_positive(out, dy - total)

    def in_one(dy, out):
        return masked(_at_most_largest(_where_positive(out, dy), axis), out)

    return {"cuda": in_one if _in_one_kernel(out, axis) else masked, "default": masked}


def _once_on_tpu(total):
    """Sums of rows, which XLA for TPUs otherwise takes anew in each product that reads the slope:
    ``vit_step`` takes 1.00 of the memory and moves 1.00 of the bytes so, else 1.06 and 1.07; with
    one layer, by log-softmax's, ``gpt_step`` 0.08 and 0.83, else 1.02 and 1.06.
    """
    if not isinstance(total, jax.core.Tracer):  # computed already
        return total
    return at_lowering(total, default=_as_it_is, tpu=_apart)[0]


def _as_it_is(x):
    return [x]


def _apart(x):
    return [lax.optimization_barrier(x)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _at_most_largest(x, axis):
    """x, since no number is above the largest; the derivative of a minimum would be half at ties.

    But what meets one number of its row XLA computes on a GPU in one kernel, with what is next to
    it: the sum of a softmax by itself it does not.
    """
    return jnp.minimum(x, jnp.max(x, axis, keepdims=True))


_at_most_largest.defjvp(lambda axis, x, dots: (_at_most_largest(*x, axis), *dots))


def _in_one_kernel(out, axis):
    """Whether a row lies together and fits into one program of a GPU: ``vit_step`` moves 1.006 of
    what `jax.grad` moves so, else 1.024.
    """
    return axis in (-1, out.ndim - 1) and out.ndim > 0 and 0 < out.shape[-1] <= LONGEST


def _softmax_in_little(dy, out, *, axis):
    """With no choice by its sum, over which one more array of `out`'s size is held.

    On CPUs what does not count is taken out first and put down, as y is, and the sum as well: what
    follows XLA then writes where ȳ was. Attention in `jax.checkpoint` in a scan, 512 x 256, float32
    takes 1.19 of `jax.grad`'s memory with the choice, 1.05 with ȳ alone put down, 0.95 so.
    """

    def put_down(dy, out):
        dy, out = jc.behind_barrier((_where_positive(out, dy), out))
        return out * sum(jc.behind_barrier((dy, -jnp.sum(dy * out, axis, keepdims=True))))

    return by_platform(dy, out, cpu=put_down, **_masked_softmax(out, axis))


class Softmax(Pullbacks):
    """Its backward pass is in three forms."""

    def __init__(self, *args):
        super().__init__(*args)
        self.in_little = Pullbacks(args[0], args[1], {"x": _softmax_in_little})

    def prepare(self, site):
        return self.in_little.prepare(site) if site.engine.frugal else super().prepare(site)

    def formulation(self, site):
        if site.platform == "cuda" and _in_one_kernel(site.out_avals[0], site.params["axis"]):
            return "summed masked, in one kernel"
        if site.engine.frugal:
            return in_words(site.platform, "masked, in place", "cpu", "summed masked")
        form = "summed as it stands, again if not finite"
        return in_words(site.platform, form, "cpu", "summed masked") if site.platform else ""


def _where_positive(out, x):
    return lax.select(out == 0, lax.full_like(x, 0), x)


# Compiled, as what it stands for is.
@functools.partial(jax.jit, static_argnames=("axes", "keepdims", "dtype"))
def _variance(x, ddof, axes, keepdims, dtype):
    """y and μ."""
    x = at_least_float32(x)
    mean = jnp.mean(x, axes, keepdims=True)
    n = math.prod(x.shape[a] for a in axes) - lax.convert_element_type(ddof, x.dtype)
    y = jnp.sum(lax.square(x - mean), axes, keepdims=keepdims) / n
    return jnp.where(n > 0, y, jnp.nan).astype(dtype), mean


class Variance(Rule):
    """μ is kept: summed again, by devices that share out what is summed, it would be sent again."""

    def keeps(self):
        return "x and μ"

    def prepare(self, site):
        axis, keepdims = site.params["axis"], site.params["keepdims"]
        (x_aval, *_), (out,) = site.in_avals, site.out_avals
        axes = tuple(a % x_aval.ndim for a in (axis if isinstance(axis, tuple) else (axis,)))

        def forward(x, ddof):
            y, mean = _variance(x, ddof, axes, keepdims, out.dtype)
            return [y], (mean, ddof)

        def backward(kept, extra, douts):
            (x,), (mean, ddof), (dy,) = kept, extra, douts
            dy = (dy if keepdims else jnp.expand_dims(dy, axes)).astype(mean.dtype)
            n = math.prod(x.shape[a] for a in axes) - lax.convert_element_type(ddof, mean.dtype)
            centred = x.astype(mean.dtype) - mean
            # Once more, for what rounding left in μ: of numbers around 10⁴ it is 3e-6 of x̄.
            centred = centred - jnp.mean(centred, axes, keepdims=True)
            return [(centred * (dy * (2 / n))).astype(x.dtype), None]

        return Step((0,), backward, forward)


def _hypot(dy, mine, other):
    """JAX's value at (0, 0), a kink."""
    at_zero = (mine == 0) & (other == 0)
    return dy * jnp.where(at_zero, 0.5, direction(mine, other)[0])


def _log_slope(x, a):
    """x / a, 0 where both are 0."""
    nothing = (x == 0) & (a == 0)
    return x / jnp.where(nothing, 1, a)


class LogSoftmax(Rule):
    """x and two numbers per row are kept, so that y need not exist where only a few elements of it
    are used, as in a loss by integer labels: 4096 x 1000 take 0.3 to 0.7 of `jax.grad`'s time (its
    32.8 MB are mapped anew, or not) and 0.004 of its memory
    (`python -m benchmarks --only cross_entropy`).
    """

    takes_factored = True

    def keeps(self):
        return "x, and per row its maximum and Σ exp(x − max)"

    def prepare(self, site):
        axis = site.params["axis"]

        def forward(x):
            # Also of no elements.
            top = _once_on_tpu(jnp.max(x, axis, keepdims=True, initial=-jnp.inf))
            total = _once_on_tpu(jnp.sum(jnp.exp(x - top), axis, keepdims=True))
            return [x - top - jnp.log(total)], (top, total)

        def backward(kept, extra, douts):
            (x,), (top, total), (dy,) = kept, extra, douts
            if isinstance(dy, Rows):
                p = jnp.exp(x - top - jnp.log(total))
                return [dy.add_to(-p * jnp.expand_dims(dy.sum(axis), axis))]
            # The exponential is the forward's, and the quotient of the sums comes first: 512 x 1024
            # take 1.4 times as long with another one, 7 times with the quotient exp / total.
            return [dy - jnp.exp(x - top) * (jnp.sum(dy, axis, keepdims=True) / total)]

        return Step((0,), backward, forward)


# Compiled, as the parts are by the call they stand in: un-jitted, these took 1.5 times as long.
@functools.partial(jax.jit, static_argnames=("axis", "epsilon"))
def _standardized(x, axis, epsilon):
    """y, 1 / σ, and the slope of max(·, 0) at what rounding left of Σ x² / n − μ²."""
    mean = jnp.mean(x, axis, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis, keepdims=True) - jnp.square(mean)
    scale = lax.rsqrt(jnp.maximum(variance, 0) + epsilon)
    return (x - mean) * scale, scale, 0.5 + 0.5 * jnp.sign(variance)


@functools.partial(jax.jit, static_argnames="axis")
def _standardized_cotangent(dy, y, scale, slope, axis):
    along = slope * jnp.mean(dy * y, axis, keepdims=True)
    return scale * (dy - jnp.mean(dy, axis, keepdims=True) - y * along)


class Standardize(Rule):
    """y is kept, which what it goes into mostly keeps, too, and two numbers per row: half of what
    the parts keep. 4096 x 512 and 8192 x 768 take 0.3-0.7 of `jax.grad`'s time and 0.004 of its
    memory, 512 x 256 take 0.7-0.8 and 0.8 (`python -m benchmarks --only standardize`).
    """

    def keeps(self):
        return "y, and per row 1 / σ and whether σ² was cut off at 0"

    def prepare(self, site):
        axis, epsilon = site.params["axis"], site.params.get("epsilon", 1e-5)

        def forward(x, *_):  # another epsilon than 1e-5 is an operand, a literal
            y, *extra = _standardized(x, axis, epsilon)
            return [y], extra

        def backward(kept, extra, douts):
            dx = _standardized_cotangent(*douts, *kept, *extra, axis)
            return [dx, *(None for _ in site.in_avals[1:])]

        return Step((len(site.in_avals),), backward, forward)


RULES = [
    elementwise(
        "jax.nn.relu",
        "y = max(x, 0);  x̄ = ȳ where y > 0, else 0 (also at x = 0, as JAX).  Keeps y.",
        lambda dy, out: jnp.where(out > 0, dy, jnp.zeros_like(dy)),
    ),
    elementwise(
        "jax.nn.gelu",
        "y = x Φ(x), Φ = (1 + erf(x / √2)) / 2 or by tanh;  x̄ = ȳ (Φ + x Φ'), also where "
        "x² overflows.  Keeps x.",
        gelu_pullback,
    ),
    elementwise(
        "jax.nn.silu",
        "y = x σ(x);  x̄ = ȳ (σ + x σ (1 − σ)), also at ±∞.  Keeps x.",
        silu_pullback,
    ),
    elementwise(
        "jax.nn.log_sigmoid",
        "y = log σ(x) = −log(1 + e⁻ˣ);  x̄ = ȳ σ(−x).  Keeps x.",
        lambda dy, x: dy * lax.logistic(-x),
    ),
    Softmax(
        "jax.nn.softmax",
        "y = eˣ / Σ eˣ along axis;  x̄ = y (ȳ − Σ ȳ y), 0 where y = 0.  Keeps y.",
        {"x": _softmax},
    ),
    LogSoftmax("jax.nn.log_softmax", "y = x − log Σ eˣ along axis;  x̄ = ȳ − eʸ Σ ȳ."),
    Variance(
        "jax.numpy.var",
        "y = Σ (x − μ)² / (n − ddof) along axis, μ = Σ x / n;  x̄ = 2 ȳ (x − μ) / (n − ddof).",
    ),
    broadcasting(
        "jax.numpy.hypot",
        "y = √(a² + b²);  ā = ȳ a / y, b̄ = ȳ b / y, their limits where a or b is infinite.  Kink "
        "(0, 0): 1/2 to either, as JAX.  Keeps a and b.",
        a=lambda dy, a, b: _hypot(dy, a, b), b=lambda dy, a, b: _hypot(dy, b, a),
    ),
    broadcasting(
        "jax.numpy.logaddexp",
        "y = log(eᵃ + eᵇ);  ā = ȳ exp(a − y), b̄ = ȳ exp(b − y), 0 where y = −∞.  Keeps a, b, y.",
        a=lambda dy, a, out: dy * lax.exp(below(a, out)),
        b=lambda dy, b, out: dy * lax.exp(below(b, out)),
    ),
    broadcasting(
        "jax.numpy.logaddexp2",
        "y = log₂(2ᵃ + 2ᵇ);  ā = ȳ 2^(a − y), b̄ = ȳ 2^(b − y), 0 where y = −∞.  Keeps a, b, y.",
        a=lambda dy, a, out: dy * lax.exp2(below(a, out)),
        b=lambda dy, b, out: dy * lax.exp2(below(b, out)),
    ),
    broadcasting(
        "jax.scipy.special.xlogy",
        "y = x log a, 0 where x = 0;  x̄ = ȳ log a, ā = ȳ x / a, 0 where x = a = 0.  Keeps x and a.",
        x=lambda dy, a: dy * lax.log(a), a=lambda dy, x, a: dy * _log_slope(x, a),
    ),
    broadcasting(
        "jax.scipy.special.xlog1py",
        "y = x log(1 + a), 0 where x = 0;  x̄ = ȳ log(1 + a), ā = ȳ x / (1 + a), 0 where x = 0 and "
        "a = −1.  Keeps x and a.",
        x=lambda dy, a: dy * lax.log1p(a), a=lambda dy, x, a: dy * _log_slope(x, 1 + a),
    ),
    Standardize(
        "jax.nn.standardize",
        "y = (x − μ) / σ, σ² = max(Σ x² / n − μ², 0) + ε along axis;  x̄ = (ȳ − Σ ȳ / n − "
        "y Σ ȳ y / n) / σ, without the last term (at a tie, half of it) where max gave 0.",
    ),
]
