"""Rows of rules/control.py and rules/loop.py: equations that contain other equations."""

import jax
import jax.numpy as jnp
from jax import lax

from cases.case import Case, definite, exactly, real


def cell(carry, x):
    """Two carried values of different shape, a result per step."""
    h, n = carry
    h = jnp.tanh(h * x + n)
    return (h, n * 0.5 + jnp.sum(h)), jnp.sin(h) * x


def loop(**options):
    return lambda h, n, xs: lax.scan(cell, (h, n), xs, **options)


def weights(w, h, xs):
    """A recurrence with loop constants, one of them seen only through a function of it."""

    def step(h, x):
        h = jnp.tanh(h @ jnp.exp(w) + x)
        return h, h

    return lax.scan(step, h, xs)


def nested(h, xs):
    """A scan in a scan; the inner length is 2."""

    def outer(h, x):
        h, ys = lax.scan(lambda a, b: (jnp.sin(a * b), a), h, x)
        return h + x[0], jnp.sum(ys)

    return lax.scan(outer, h, xs)


def counted(h, xs):
    """An integer carry, and a branch on it."""

    def step(carry, x):
        i, h = carry
        h = jnp.where(i % 2 == 0, jnp.sin(h * x), h + x)
        return (i + 1, h), i

    return lax.scan(step, (0, h), xs)[0][1]


@jax.custom_jvp
def steep(x, y):
    return jnp.sin(x) * y


@steep.defjvp
def _(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    return steep(x, y), 3.0 * jnp.cos(x) * y * dx + jnp.sin(x) * dy


@jax.custom_vjp
def clipped(x, y):
    return x * y, jnp.sin(x)


clipped.defvjp(
    lambda x, y: (clipped(x, y), (x, y)),
    lambda kept, ct: (ct[0] * kept[1] + ct[1] * jnp.cos(kept[0]), 2.0 * ct[0] * kept[0]),
)

def solve(a, b):
    """a x = b by a solver that reports its residual."""
    inverse = lambda m: lambda _, y: jnp.linalg.inv(m) @ y
    return lax.custom_linear_solve(lambda v: a @ v, b, inverse(a), inverse(a.T))


def symmetric_solve(a, b):
    """(a + aᵀ) x = b."""
    s = a + a.T
    return lax.custom_linear_solve(
        lambda v: s @ v, b, lambda _, y: jnp.linalg.inv(s) @ y, symmetric=True
    )


def scaled(x):
    """A linear function with its own transpose."""
    scale = jnp.arange(3, dtype=x.dtype)
    return jax.custom_derivatives.linear_call(
        lambda r, x: x * r, lambda r, y: y * r, scale, x
    )


F64 = 8

CASES = [
    Case("jit", lambda x, y: jax.jit(lambda a, b: jnp.tanh(a) * b)(x, y), (real(2, 3), real(2, 3)),
         kept=2 * 6 * F64),  # tanh a and b; mul and tanh share the former
    Case("cond", lambda x, y: lax.cond(True, lambda a, b: jnp.sin(a) * b, lambda a, b: b, x, y),
         (real(2, 3), real(2, 3)), "cond", kept=3 * 6 * F64),
    Case("cond", lambda i, x: lax.switch(i, [jnp.sin, jnp.exp, lambda a: a * a * a], x),
         (exactly(1, "int32"), real(2, 3)), "switch", kept=4 + 3 * 6 * F64),
    Case("scan", loop(), (real(2), real(), real(3, 2)), kept=(6 + 6 + 6 + 6) * F64),
    Case("scan", loop(reverse=True), (real(2), real(), real(3, 2)), "reverse", kept=24 * F64),
    Case("scan", loop(unroll=2), (real(2), real(), real(3, 2)), "unroll", kept=24 * F64),
    Case("scan", loop(), (real(2), real(), real(1, 2)), "one step", kept=8 * F64),
    Case("scan", loop(length=0), (real(2), real(), real(0, 2)), "no step", kept=0),
    Case("scan", lambda xs: lax.scan(lambda c, x: (c, jnp.sin(x)), None, xs)[1], (real(3, 2),),
         "no carry", kept=6 * F64),
    Case("scan", weights, (real(2, 2, scale=0.3), real(2), real(3, 2)), "constants",
         kept=(4 + 2 * 3 + 2 * 3) * F64),
    Case("scan", nested, (real(), real(3, 2)), "nested", kept=3 * 6 * F64),  # a, b and a b
    Case("scan", counted, (real(), real(3)), "integer carry",
         kept=3 * 3 * F64 + 3),  # h, x and h x; of the counter only whether it is even
    Case("remat2", lambda x, y: jax.checkpoint(lambda a, b: jnp.sin(jnp.sin(a) * b))(x, y),
         (real(2, 3), real(2, 3)), kept=2 * 6 * F64),
    Case("remat2", lambda x, y: jax.checkpoint(
        lambda a, b: jnp.sin(jnp.sin(a @ b)), policy=jax.checkpoint_policies.dots_saveable)(x, y),
         (real(2, 3), real(3, 5)), "dots saveable", kept=(6 + 15 + 10) * F64),
    Case("custom_jvp_call", steep, (real(2, 3), real(2, 3)), differences=False,
         kept=2 * 6 * F64),
    Case("custom_vjp_call", clipped, (real(2, 3), real(2, 3)), differences=False,
         kept=2 * 6 * F64),
    Case("linear_call", scaled, (real(2, 3),), kept=3 * F64, vmap=False, differences=False),
    Case("custom_linear_solve", solve, (definite(3), real(3)), dtypes=("float32",),
         kept=(9 + 9 + 3) * F64),  # a, its transpose, the solution
    Case("custom_linear_solve", symmetric_solve, (definite(3), real(3)), "symmetric",
         dtypes=("float32",), kept=(9 + 3) * F64),
]
