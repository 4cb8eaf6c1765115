"""Which values are watched: of a plan those results of equations that say something of their own.

A plan's equations stand in bodies inside of one another (calls, loops, branches). `points` goes
through all of them, and what is found is a tree in their form.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from typing import NamedTuple

from fbprop.core import jaxcompat as jc
from fbprop.core.library import CALLS, call_name
from fbprop.rules import arithmetic, elementwise

EVERYTHING = "*"
# Equations whose inside is watched in place of their results.
BODIES = frozenset(
    ("call", "closed_call", "cond", "core_call", "jit", "remat2", "scan", "shard_map")
)
# The operand's numbers, some of them, in another place or type.
MOVES = frozenset((
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "dynamic_slice",
    "expand_dims", "gather", "name", "optimization_barrier", "pad", "reshape", "rev", "slice",
    "split", "squeeze", "stop_gradient", "transpose", "unstack",
))
# What a chain goes on through; its values before the last one need not exist as arrays, and XLA
# mostly does not make them: a rectifier's, looked at before it is pooled, costs `convnet_step` 0.2
# of its time and 0.3 of its memory.
CHAINED = frozenset((
    *(r.name for family in (arithmetic, elementwise) for r in family.RULES),
    "jax.nn.gelu", "jax.nn.relu", "jax.nn.silu", "jax.nn.softmax",
))
REDUCTIONS = frozenset((
    "reduce_max", "reduce_min", "reduce_sum", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum", "scatter-add",
))


class Point(NamedTuple):
    """One watched value.

    Attributes:
      path: named scopes around its equation, joined by "/".
      primitive: the equation's primitive, or the library function it is.
      line: where the user wrote it.
      shape, dtype: of the value; inside a loop, of one step's.
      steps: lengths of the loops around it, the outermost first; of a `shard_map`, its devices.
      kept: bytes kept for the backward pass of the values made since the point before it, over all
        steps; what rules keep besides values is not among them: `fbprop.watch.kept` has it all.
    """

    path: str
    primitive: str
    line: str
    shape: tuple[int, ...]
    dtype: str
    steps: tuple[int, ...]
    kept: int = 0

    @property
    def name(self) -> str:
        """Path and primitive, what patterns are compared with."""
        return f"{self.path}/{self.primitive}" if self.path else self.primitive


def points(plan, where: str, table) -> dict:
    """``{equation's number: {result's number: Point} or [the same of each inner body]}``."""
    met = []
    found = _points(plan, "", (), where, table, met)
    if not found:
        names = sorted(set(met))
        near = difflib.get_close_matches(where, names, 3) or names[:3]
        raise ValueError(
            "where is a pattern on the path and name of equations that a differentiated value "
            f"passes through, got {where!r} expected one that some of them match, e.g. "
            f"{', '.join(map(repr, near)) or 'none is there'}; what only moves numbers "
            "(reshape, transpose, ...) is not watched."
        )
    return found


def _points(plan, path, steps, where, table, met):
    body = jc.open_jaxpr(plan.jaxpr)
    found, passed, readers = {}, set(), _readers(body)
    numbered = [*enumerate(zip(body.eqns, plan.steps))]
    for i, (eqn, decided) in reversed(numbered):
        if decided is None:
            continue
        site, rule, step = decided
        here = within(path, eqn)
        if step.inner and eqn.primitive.name in BODIES:
            around = (*steps, *times(eqn))
            inner = [_points(b.plan, here, around, where, table, met) for b in step.inner]
            if any(inner):
                found[i] = inner
        elif not _is_left_out(eqn, rule, where):
            name = name_of(eqn, table)
            point = Point(here, name, jc.source_line(eqn) or "", (), "", steps)
            met.append(point.name)
            if not any(_matches(where, here, n) for n in (name, eqn.primitive.name)):
                continue
            passed.add(i)
            (only,) = [*{*readers.get(eqn.outvars[0], ())}] if _read_once(eqn, readers) else (-1,)
            if only not in passed or not _goes_on(eqn, body.eqns[only], table):
                found[i] = {
                    r: point._replace(shape=v.aval.shape, dtype=v.aval.dtype.name)
                    for r, v in enumerate(eqn.outvars) if site.wanted[r]
                }
    _count_kept(plan, body, found, math.prod(steps))
    return found


def times(eqn) -> tuple[int, ...]:
    """How often the inside of an equation runs, each with values of its own, if not once."""
    if eqn.primitive.name == "scan":
        return (eqn.params["length"],)
    if eqn.primitive.name == "shard_map":
        shape = eqn.params["mesh"].shape
        return (math.prod(shape[a] for a in eqn.params["newly_manual_axes"]),)
    return ()


def _count_kept(plan, body, found, runs):
    """Writes down at a body's points what is kept of the values made up to each."""
    kept, waiting, last = set(plan.keep), 0, None
    for i, eqn in enumerate(body.eqns):
        waiting += runs * sum(jc.nbytes(v.aval) for v in eqn.outvars if v in kept)
        if isinstance(found.get(i), dict) and found[i]:
            last = found[i], min(found[i])
            waiting = _add_kept(*last, waiting)
    if last:
        _add_kept(*last, waiting)


def _add_kept(of_results, r, count):
    of_results[r] = of_results[r]._replace(kept=of_results[r].kept + count)
    return 0


def _is_left_out(eqn, rule, where):
    derivative = where == EVERYTHING and jc.is_derivative(eqn)
    return eqn.primitive.name in MOVES or rule.takes_factored or derivative


def within(path, eqn):
    """The path of an equation in a body that has this path."""
    return "/".join(p for p in (path, jc.scope(eqn)) if p)


def name_of(eqn, table):
    """The name of the library function that an equation is, if it has a rule, or its primitive."""
    function = table.function(eqn)[0]
    if function is None and eqn.primitive.name in CALLS:
        return f"{eqn.primitive.name} {call_name(eqn)}"
    return function or eqn.primitive.name


def _matches(where, path, name):
    return fnmatch.fnmatchcase(f"{path}/{name}" if path else name, where)


def _readers(body):
    """Per variable the numbers of the equations that read it, None for the caller."""
    readers = {}
    for i, eqn in enumerate(body.eqns):
        for v in filter(jc.is_var, eqn.invars):
            readers.setdefault(v, []).append(i)
    for v in filter(jc.is_var, body.outvars):
        readers.setdefault(v, []).append(None)
    return readers


def _read_once(eqn, readers):
    return len(eqn.outvars) == 1 and len({*readers.get(eqn.outvars[0], ())}) == 1


def _goes_on(eqn, reader, table):
    """Whether a value is one of a chain in a scope, and not its last."""
    name = name_of(reader, table)
    same = reader.outvars[0].aval.shape == eqn.outvars[0].aval.shape
    goes_on = (name in CHAINED and same) or name in REDUCTIONS
    return goes_on and jc.scope(eqn) == jc.scope(reader)


def leaves(found: dict) -> list[Point]:
    """The points of a tree, in the order of the leaves of a pytree of its form."""
    out = []
    for i in sorted(found):
        inner = found[i]
        if isinstance(inner, list):
            out += [p for body in inner for p in leaves(body)]
        else:
            out += [inner[r] for r in sorted(inner)]
    return out
