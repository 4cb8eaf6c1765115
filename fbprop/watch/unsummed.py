"""Rules under which a weight's cotangent stays in factors where the table's would sum it.

A convolution's kernel gets its input and the cotangent of its result; a loop collects the factors
of all steps instead of adding up a product per chunk of steps.
"""

from __future__ import annotations

import functools

from fbprop.core import cotangent as ct
from fbprop.core.factored import Contraction, Rows
from fbprop.core.table import Table
from fbprop.rules import convolution, loop, sweep
from fbprop.watch.factors import Kernel


class _Sweep(sweep.Sweep):
    """All steps in one chunk, whose products are not done."""

    size = staticmethod(lambda length: None)

    def _summed(self, d, total):
        return d if isinstance(d, (Contraction, Rows)) else d.add_to(total)


class _Scan(loop.Scan):
    sweep = _Sweep


def _convolved(site, kept, dy):
    by_operand = dict(zip(convolution._keep(site), kept))
    problem = convolution.Problem(site)
    stays = site.factored[1] and not site.engine.looped and problem.batch_groups == 1
    empty = any(a.size == 0 for a in (*site.in_avals, *site.out_avals))
    if empty or not (site.active[1] and stays) or convolution._in_types(site):
        return convolution._backward(site, kept, dy)
    w = site.in_avals[1]
    dw = Kernel(by_operand[0], dy, problem, w.shape, w.dtype)
    dx = convolution.cotangent(site, 0, dy, by_operand[1]) if site.active[0] else ct.ZERO
    return [dx, dw]


@functools.lru_cache(64)
def unsummed(table: Table) -> Table:
    """The table with these rules, but where the user has overridden the table's."""
    stock = table["conv_general_dilated"]
    rules = [
        convolution.Convolution(
            stock.name, stock.math, _convolved, keep=convolution._keep, keeps=stock.keeps(),
        ),
        _Scan(),
    ]
    return table.override(*(r for r in rules if r.name not in table.overridden))
