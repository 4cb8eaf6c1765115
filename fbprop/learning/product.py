"""A product whose backward pass to its input goes through another weight than the forward pass.

y = x w,  w̄ = xᵀ ȳ as ever,  x̄ = ȳ bᵀ with a feedback weight b of w's shape. It is a primitive, so
that fbprop's rules do the work: a loop collects the factors of w̄ over its steps, as of w's own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.halves import evaluate, halves
from fbprop.core.rule import Rule, Step
from fbprop.core.table import Table

fed_product = Primitive("fed_product")


def fed(eqn, operands, at: int, feedback):
    """The result of an equation that multiplies two operands, the weight being that at ``at``.

    Args:
      eqn: of a product, linear in each of its first two operands.
      feedback: takes the weight's place where cotangents of the other operand are computed.
    """
    jaxpr = _as_jaxpr(eqn)
    return [fed_product.bind(*operands, feedback, at=at, jaxpr=jaxpr)]


@functools.lru_cache(512)
def _as_jaxpr(eqn):
    """The equation as a closed jaxpr: one object, so that what is made of it is made once."""
    return jax.make_jaxpr(lambda *xs: jc.bind(eqn, xs)[0])(*(v.aval for v in eqn.invars))


def _evaluate(*operands, at, jaxpr):
    return jc.as_function(jc.closed(jaxpr))(*operands[:-1])[0]


def _batch(args, dims, *, at, jaxpr):
    """Under `jax.vmap`; the weight and its feedback are batched alike."""
    args, dims, size = list(args), list(dims), next(
        x.shape[d] for x, d in zip(args, dims) if d is not None
    )
    if dims[at] != dims[-1]:
        for i in (at, -1):
            x, d = args[i], dims[i]
            args[i] = (
                jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
            )
            dims[i] = 0
    mapped = jax.vmap(lambda *xs: _evaluate(*xs, None, at=at, jaxpr=jaxpr), tuple(dims[:-1]))
    batched = jax.make_jaxpr(mapped)(*args[:-1])
    return fed_product.bind(*args, at=at, jaxpr=batched), 0


fed_product.def_impl(functools.partial(jax.jit(_evaluate, static_argnames=("at", "jaxpr"))))
fed_product.def_abstract_eval(lambda *_, at, jaxpr: jc.out_avals(jaxpr)[0])
mlir.register_lowering(fed_product, mlir.lower_fun(_evaluate, multiple_results=False))
batching.primitive_batchers[fed_product] = _batch


class Fed(Rule):
    """Two halves of the product, one per operand, each kept and undone as the product's own."""

    takes_zeros = True

    def __init__(self):
        super().__init__(
            "fed_product",
            "y = x w;  x̄ = ȳ bᵀ, b a feedback weight, w̄ = xᵀ ȳ.  Keeps x, b.",
        )

    def keeps(self):
        return "x, b"

    def reached(self, site):
        return (*site.active[:-1], False)

    def prepare(self, site):
        at, last = site.params["at"], len(site.in_avals) - 1
        sides = []
        for i in (1 - at, at):
            if site.active[i]:
                only = tuple(j == i for j in range(last))
                factored = tuple(f if j == i else None for j, f in enumerate(site.factored[:-1]))
                both = halves(
                    site.engine, site.params["jaxpr"], only, site.wanted, site.path, factored
                )
                sides.append((i, both, last if i != at else None))
        # Each side needs the other operand only; the extra ones (group sizes) stay as they are.
        keep = sorted({
            _place(j, at, swapped) for i, _, swapped in sides for j in range(last) if j != i
        })

        def backward(kept, _, douts):
            values, dins = dict(zip(keep, kept)), [ct.ZERO] * (last + 1)
            for i, both, swapped in sides:
                args = [values.get(_place(j, at, swapped)) if j != i else None for j in range(last)]
                dins[i] = _half(both, args, douts)[i]
            return dins

        return Step(tuple(keep), backward)


def _place(j, at, swapped):
    """Where the value of operand ``j`` stands: the feedback weight's place for the weight's."""
    return swapped if swapped is not None and j == at else j


def _half(both, args, douts):
    """Cotangents, of a half that needs neither the operand it is for nor the result."""
    n = len(args)
    at = dict(enumerate(args))
    borrowed = [at.get(i) for i in both.borrowed()]
    assert all(i < n for i in both.borrowed())
    return both.backward(both.leaves(borrowed, evaluate(both.body, args, both.new)), douts)


@functools.lru_cache(64)
def with_feedback(table: Table) -> Table:
    """The table with the rule for such products, which is no derivative and so not in the book."""
    return table.extend(Fed())
