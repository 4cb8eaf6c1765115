"""The rule for ``custom_linear_solve``: the backward pass is a solve with the transpose."""

from __future__ import annotations

from jax import lax

from fbprop.core import jaxcompat as jc
from fbprop.core.halves import halves
from fbprop.core.rule import Rule, Step


class LinearSolve(Rule):
    """A x = b, with A given as functions of constants; see `jax.lax.custom_linear_solve`."""

    def keeps(self):
        return "x and the constants of A"

    def active_out(self, site):
        # The results are x and, if the solver reports any, auxiliary values without derivative.
        n = _number_of_b(site)
        return tuple(i < n and jc.differentiable(a) for i, a in enumerate(site.out_avals))

    def reached(self, site):
        """b and the constants of the matrix-vector product: the other constants restate those."""
        n_matvec, first_b = site.params["const_lengths"].matvec, sum(site.params["const_lengths"])
        return tuple(a and (i < n_matvec or i >= first_b) for i, a in enumerate(site.active))

    def prepare(self, site):
        jaxprs, lengths = site.params["jaxprs"], site.params["const_lengths"]
        if jaxprs.transpose_solve is None:
            raise TypeError(
                "transpose_solve required for backwards mode automatic differentiation of "
                f"custom_linear_solve{site.location()}: pass it, or symmetric=True."
            )
        n, first_b = _number_of_b(site), sum(lengths)
        active = site.active[: lengths.matvec] + (False,) * n
        product = halves(site.engine, jaxprs.matvec, active, (True,) * n, site.path)

        def backward(kept, _, douts):
            consts, x = kept[:first_b], kept[first_b:]
            matvec, vecmat, solve, transpose_solve = _by_role(consts, lengths)
            # b̄ = A⁻ᵀ x̄, itself a custom solve, so that it can be differentiated again.
            db = lax.custom_linear_solve(
                lambda b: jc.as_function(jaxprs.vecmat)(*vecmat, *b),
                list(douts[:n]),
                lambda _, b: jc.as_function(jaxprs.transpose_solve)(*transpose_solve, *b)[:n],
                lambda _, b: jc.as_function(jaxprs.solve)(*solve, *b)[:n],
            )
            # k̄ = −(∂ A(k) x / ∂k)ᵀ b̄
            outs, new = product.forward(*matvec, *x)
            at = [(*matvec, *x, *outs)[i] for i in product.borrowed()]
            dk = product.backward(product.leaves(at, new), [-d for d in db])
            return [*dk[: lengths.matvec], *[None] * (first_b - lengths.matvec), *db]

        n_operands = len(site.in_avals)
        return Step((*range(first_b), *range(n_operands, n_operands + n)), backward)


def _number_of_b(site):
    return len(site.in_avals) - sum(site.params["const_lengths"])


def _by_role(consts, lengths):
    """The constants of matvec, vecmat, solve and transpose_solve."""
    parts, start = [], 0
    for length in lengths:
        parts.append(consts[start : start + length])
        start += length
    return parts


RULES = [
    LinearSolve(
        "custom_linear_solve",
        "A(k) x = b;  b̄ = A⁻ᵀ x̄, k̄ = −(∂ A(k) x / ∂k)ᵀ b̄.  Keeps x and k.",
    ),
]
