"""Going back on a trail: from a number that is not finite to the equation that made it.

Forward: a value is blamed on those of its operands that are not finite; of a select only on what it
took. Backward: a cotangent is blamed on the equations that used the value, and where one of these
got a finite cotangent itself, it made the number. What is not finite and reaches no result, as what
`jnp.where` masks, is never met.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fbprop.core import jaxcompat as jc


class Level:
    """A body of equations with the record of it, inside an equation of another level or of none.

    Args:
      given: ranges of the function's inputs, by number.
    """

    def __init__(self, plan, record, given, parent=None, number=None):
        self.plan, self.record, self.given = plan, record, given
        self.parent, self.number = parent, number
        self.body = jc.open_jaxpr(plan.jaxpr)
        self.made_by = {
            v: (i, r) for i, eqn in enumerate(self.body.eqns) for r, v in enumerate(eqn.outvars)
        }
        self.inputs = {v: k for k, v in enumerate(self.body.invars)}
        self._inner = {}

    @property
    def eqn(self):
        """The equation this is inside of."""
        return self.parent.body.eqns[self.number]

    @property
    def loop(self):
        return self.parent is not None and self.eqn.primitive.name == "scan"

    def inner(self, i):
        """The levels inside an equation."""
        if i not in self._inner:
            records = self.record["inner"].get(i, ())
            bodies = self.plan.steps[i][2].inner if records else ()
            self._inner[i] = [
                Level(b.plan, r, self.given, self, i) for b, r in zip(bodies, records)
            ]
        return self._inner[i]

    def path(self):
        """The named scopes around the equation."""
        if self.parent is None:
            return ""
        return "/".join(p for p in (self.parent.path(), jc.scope(self.eqn)) if p)


class Place(NamedTuple):
    """A variable of a level, at a step of each of the loops around it."""

    level: Level
    var: object
    at: tuple[int, ...]


class Made(NamedTuple):
    """An equation that made the number: a result of it, or the cotangent of an operand."""

    level: Level
    number: int
    at: tuple[int, ...]
    kind: str  # of the number: "nan" or "inf"
    backward: bool


def kind_of(pair) -> str | None:
    """Whether a range holds a "nan" or an "inf"; None: all is finite."""
    if np.isnan(pair).any():
        return "nan"
    return None if np.isfinite(pair).all() else "inf"


def forward(place: Place) -> Made | Place:
    """The equation that made what is not finite in a value; or the input or constant that holds it.
    """
    made = None  # the equation that made a nan of infinities, if these are nobody's doing
    while True:
        origin = _producer(place)
        if origin is None:
            return made or place
        level, i, at = origin
        kind = kind_of(range_of(place))
        blamed = _blamed(level, i, at, kind)
        if not blamed:
            return Made(level, i, at, kind, False)
        if kind == "nan" and blamed[1] != "nan":
            made = Made(level, i, at, "nan", False)
        if not jc.is_var(blamed[0]):
            return made or Place(level, blamed[0], at)
        place = Place(level, blamed[0], at)


def _producer(place):
    """(level, equation, steps) that a value comes from, calls and loops entered and left.

    None of an input of the function, or a constant.
    """
    level, v, at = place
    while jc.is_var(v):
        if v in level.inputs and level.parent is not None:
            level, v, at = _before(level, level.inputs[v], at)
        elif v in level.made_by:
            i, r = level.made_by[v]
            entered = _entered(level, i, r, at)
            if entered is None:
                return level, i, at
            level, v, at = entered
        else:
            return None
    return None


def _before(level, k, at):
    """What input k of an inner level was: an operand, or of the step before a result."""
    eqn, parent = level.eqn, level.parent
    name = eqn.primitive.name
    if name == "cond":
        return Place(parent, eqn.invars[k + 1], at)
    if not level.loop:
        return Place(parent, eqn.invars[k], at)
    n_consts, n_carry = jc.scan_sizes(eqn.params)
    step, carried = at[-1], n_consts <= k < n_consts + n_carry
    order = _order(eqn)
    if carried and step != order[0]:
        before = order[order.index(step) - 1]
        return Place(level, level.body.outvars[k - n_consts], (*at[:-1], before))
    return Place(parent, eqn.invars[k], at[:-1])


def _order(eqn):
    """A loop's steps as they run."""
    steps = [*range(eqn.params["length"])]
    return steps[::-1] if eqn.params["reverse"] else steps


def _entered(level, i, r, at):
    """The result of an inner body that result r of equation i is, at the step to blame."""
    eqn = level.body.eqns[i]
    for inner in level.inner(i):
        atom = inner.body.outvars[r]
        if not inner.loop:
            if len(level.record["inner"][i]) == 1 or _is_bad(inner, atom, at):
                return Place(inner, atom, at)
            continue
        order, carried = _order(eqn), r < jc.scan_sizes(eqn.params)[1]
        steps = order[-1:] if carried else order
        bad = [s for s in steps if _is_bad(inner, atom, (*at, s))]
        if bad:
            return Place(inner, atom, (*at, bad[0]))
    return None


def _is_bad(level, atom, at):
    if not jc.is_var(atom):
        return kind_of(np.asarray(atom.val, float)) is not None
    return kind_of(range_of(Place(level, atom, at))) is not None


def range_of(place):
    """[smallest, largest] of a variable's or literal's numbers; zeros where it is not known."""
    level, v, at = place
    while jc.is_var(v) and v in level.inputs:
        if level.parent is None:
            return np.asarray(level.given.get(level.inputs[v], np.zeros(2)))
        level, v, at = _before(level, level.inputs[v], at)
    if not jc.is_var(v):
        return np.full(2, np.asarray(v.val, float))
    if v not in level.made_by:
        consts = dict(zip(level.body.constvars, jc.consts_of(level.plan.jaxpr)))
        return _extent(consts[v])
    i, r = level.made_by[v]
    pairs = level.record["values"][i]
    return np.asarray(pairs[r])[at] if r in pairs else np.zeros(2)


def _extent(x):
    try:
        x = np.asarray(x, float)
    except (TypeError, ValueError):  # keys; values that are not known
        return np.zeros(2)
    return np.array([x.min(), x.max()]) if x.size else np.zeros(2)


def _blamed(level, i, at, kind):
    """(operand, kind) of an equation that brought what is not finite into it, a nan before an inf.

    An infinity comes of an infinity; a nan of either.
    """
    found = []
    chosen = level.record["chosen"].get(i, {})
    for k, v in enumerate(level.body.eqns[i].invars):
        if not jc.differentiable(v.aval):
            continue
        pair = chosen[k][at] if k in chosen else range_of(Place(level, v, at))
        if (got := kind_of(pair)) and not (kind == "inf" and got == "nan"):
            found.append((v, got))
    return next((f for f in found if f[1] == "nan"), found[0] if found else None)


def backward(level: Level, var) -> Made | None:
    """The equation whose pullback made what is not finite in the cotangent of a variable."""
    at = ()
    while True:
        use = _bad_use(level, var, at)
        if use is None:
            return None
        if use[0] == "return":
            level, var, at = _after(level, use[1], at)
            continue
        _, i, k = use
        entered = _into(level, i, k, at)
        if entered is not None:
            level, var, at = entered
            continue
        results = [v for v in level.body.eqns[i].outvars if _bad_use(level, v, at)]
        if not results:
            return Made(level, i, at, kind_of(level.record["uses"][i][k][at]), True)
        var = results[0]


def _bad_use(level, var, at):
    """A use of a variable that gives its cotangent what is not finite; the last one first."""
    for j, pair in level.record["returns"].items():
        if level.body.outvars[j] is var and kind_of(pair[at]):
            return "return", j
    for i in sorted(level.record["uses"], reverse=True):
        for k, pair in level.record["uses"][i].items():
            if level.body.eqns[i].invars[k] is var and kind_of(pair[at]):
                return "use", i, k
    return None


def _after(level, j, at):
    """What result j of an inner body becomes: an equation's result, or the next step's input."""
    eqn = level.eqn
    if not level.loop:
        return level.parent, eqn.outvars[j], at
    n_consts, n_carry = jc.scan_sizes(eqn.params)
    order, step = _order(eqn), at[-1]
    if j < n_carry and step != order[-1]:
        after = order[order.index(step) + 1]
        return level, level.body.invars[n_consts + j], (*at[:-1], after)
    return level.parent, eqn.outvars[j], at[:-1]


def _into(level, i, k, at):
    """The input of an inner body that operand k of an equation is, at the step to blame."""
    eqn = level.body.eqns[i]
    for inner in level.inner(i):
        k_inside = k - 1 if eqn.primitive.name == "cond" else k
        var = inner.body.invars[k_inside]
        steps = [at]
        if inner.loop:
            n_consts, n_carry = jc.scan_sizes(eqn.params)
            order = _order(eqn)
            carried = n_consts <= k < n_consts + n_carry
            steps = [(*at, s) for s in (order[:1] if carried else order[::-1])]
        for at_step in steps:
            if _bad_use(inner, var, at_step):
                return inner, var, at_step
    return None
