"""Rows of rules/cumulative.py."""

from jax import lax

from cases.case import Case, apart, complex_, exactly, real

SCANS = {
    "cumsum": (lax.cumsum, real), "cumprod": (lax.cumprod, real), "cummax": (lax.cummax, apart),
    "cummin": (lax.cummin, apart), "cumlogsumexp": (lax.cumlogsumexp, real),
}

CASES = [
    Case(name, lambda x, f=f, a=axis, r=reverse: f(x, a, r), (make(*shape),), label)
    for name, (f, make) in SCANS.items()
    for label, shape, axis, reverse in (
        ("5", (5,), 0, False), ("axis 1", (2, 3), 1, False), ("reverse", (2, 3), 0, True),
        ("one", (2, 1), 1, False),
    )
] + [
    Case("cumprod", lax.cumprod, (real(7),), "7"),
    Case("cumsum", lax.cumsum, (complex_(5, 2),), "complex", dtypes=("float32",)),
    Case("cumprod", lax.cumprod, (complex_(5, 2),), "complex", dtypes=("float32",)),
    # x̄ₖ = Σᵢ ∏ⱼ≠ₖ xⱼ over i ≥ k: a division by x would be wrong at each of these.
    Case("cumprod", lax.cumprod, (exactly([2.0, 0.0, 3.0, 0.0, 5.0]),), "zeros",
         at=((([2.0, 0.0, 3.0, 5.0],), {0: [1.0, 38.0, 0.0, 0.0]}),)),
    Case("cummax", lax.cummax, (exactly([2.0, 2.0, 1.0, 3.0, 3.0]),), "ties", differences=False,
         at=((([2.0, 2.0],), {0: [1.5, 0.5]}),)),
    Case("cummin", lax.cummin, (exactly([2.0, 2.0, 1.0, 1.0, 1.0]),), "ties", differences=False,
         at=((([2.0, 2.0],), {0: [1.5, 0.5]}),)),
]
