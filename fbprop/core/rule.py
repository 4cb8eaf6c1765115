"""What a rule is, and the kinds of rule: one registration each.

A rule tells how the cotangent of an equation's result becomes cotangents of its operands. On the
page it is a name, its mathematics, and one *pullback* per operand, whose **parameter names declare
what is kept** from the forward pass::

    rule("div", "y = a / b;  ā = ȳ / b,  b̄ = −ȳ y / b",
         a=lambda dy, b: dy / b,
         b=lambda dy, b, out: -dy * out / b)

* the first parameter is the result's cotangent: ``dy``, or ``dys`` for the tuple of all results';
* the others are operand names (the keywords above, in operand order) or ``out``, the result:
  these values, and no others, are kept for the backward pass, once, while the operand is active;
* keyword-only parameters are the primitive's parameters, or static types: ``<operand>_aval``,
  ``out_aval``.

Everything else about cotangents (zeros, sums, broadcasting, checks) is the engine's business.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from fbprop.core.jaxcompat import differentiable, source_line


class Site:
    """One equation as a rule sees it before anything runs: types, parameters, what is wanted.

    Attributes:
      name: the primitive's name.     params: its parameters.
      in_avals, out_avals: types of operands and results (``.shape``, ``.dtype``).
      active: per operand, whether a differentiated input reaches it.
      wanted: per result, whether its cotangent can be other than zero.
      factored: per operand, in which form (a subclass of `Factored`) its cotangent is of use if it
        is returned unevaluated, or None; it may be returned so in any case.
      path: named scopes around it, ``"encoder/dense"``.
      engine: the two sweeps, for rules about equations that contain other equations.
      platform: where `fbprop.explain` was asked about; None: anywhere. What runs is chosen when a
        program is lowered (`fbprop.core.devices`), and nobody knows before.
    """

    platform = None

    def __init__(self, eqn, path, active, engine):
        self.eqn, self.path, self.active, self.engine = eqn, path, active, engine
        self.name, self.params = eqn.primitive.name, eqn.params
        self.wanted = (True,) * len(eqn.outvars)
        self.factored = (None,) * len(eqn.invars)

    @property
    def in_avals(self):
        return [v.aval for v in self.eqn.invars]

    @property
    def out_avals(self):
        return [v.aval for v in self.eqn.outvars]

    def on(self, platform: str | None) -> Site:
        """The same equation, to be explained for a platform."""
        other = copy.copy(self)
        other.platform = platform
        return other

    def location(self):
        """Where the user wrote it, as the end of a sentence."""
        line = source_line(self.eqn)
        parts = [f"at {line}"] * bool(line) + [f"path {self.path!r}"] * bool(self.path)
        return f" ({', '.join(parts)})" if parts else ""


class Step(NamedTuple):
    """What a rule decided for one equation: the engine runs this and nothing else.

    keep: indices into (*operands, *results) of the values to keep.
    backward: (kept values, extra, result cotangents) -> one cotangent (or None) per operand.
    forward: (*operands) -> (results, extra), or None to evaluate the equation as it stands;
      ``extra`` is a pytree of arrays kept besides ``keep``.
    inner: the halves of equations inside this one (`fbprop.core.halves.Halves`), for `explain`.
    slots: of a loop, where each leaf that its inner halves keep is kept: see its rule.
    at_hand: indices of values that are not kept for it. The engine gives them to backward after
      those that are, None for what is not at hand in the same trace.
    """

    keep: tuple[int, ...]
    backward: Callable
    forward: Callable | None = None
    inner: tuple = ()
    slots: tuple = ()
    at_hand: tuple[int, ...] = ()


class Rule:
    """Base of all rules; a kind of rule overrides the three questions the engine asks."""

    broadcasts = False
    takes_zeros = False  # result cotangents may be ZERO; otherwise they are filled in
    takes_factored = False  # they may be `fbprop.core.factored.Factored`, or this kind; else arrays

    def __init__(self, name: str, math: str, *sources: Callable | None):
        for what, value in (("name", name), ("mathematics", math)):
            if not isinstance(value, str):
                raise TypeError(
                    f"A rule has a name and its mathematics as text, got {value!r} as {what} "
                    "expected a string: fbprop.rule('tanh', 'y = tanh x; ...', x=lambda dy: ...)."
                )
        self.name, self.math = name, " ".join(math.split())
        self._sources = [f for f in sources if hasattr(f, "__code__")]

    @property
    def where(self) -> str:
        """``file:line`` of the rule."""
        source = self.sources()[0]
        if inspect.isclass(source):
            return f"{inspect.getsourcefile(source)}:{inspect.getsourcelines(source)[1]}"
        return f"{source.__code__.co_filename}:{source.__code__.co_firstlineno}"

    def sources(self) -> list:
        """The functions that make up the rule, or its class."""
        return self._sources or [type(self)]

    def keeps(self) -> str:
        """What is kept, in words, for the rule book."""
        return "nothing"

    def declared(self, site: Site) -> tuple[int, ...] | None:
        """Indices into (*operands, *results) of what is kept; None if it is not among them."""
        return None

    def active_out(self, site: Site) -> tuple[bool, ...]:
        """Which results depend differentiably on the active operands."""
        return tuple(differentiable(a) for a in site.out_avals)

    def reached(self, site: Site) -> tuple[bool, ...]:
        """Which operands can get a cotangent, given ``site.wanted``."""
        return site.active

    def formulation(self, site: Site) -> str:
        """Which of several ways of computing it is taken here, and "" if there is one."""
        return ""

    def on_tangents(self) -> Rule:
        """The rule for the same equation where what is differentiated is a function of tangents."""
        return self

    def prepare(self, site: Site) -> Step:
        raise NotImplementedError

    def __repr__(self):
        return f"<fbprop rule {self.name!r}: {self.math}>"


class NoGradient(Rule):
    """The result does not depend differentiably on any operand."""

    def active_out(self, site):
        return (False,) * len(site.out_avals)


class Pullbacks(Rule):
    """One pullback per operand; parameter names declare what is kept."""

    def __init__(self, name, math, pullbacks: dict[str, Callable | None], broadcasts=False):
        super().__init__(name, math, *pullbacks.values())
        if "out" in pullbacks:
            raise TypeError(
                "A pullback asks for the result as 'out', got an operand of that name expected "
                f"another in the rule for {name!r}."
            )
        self.operands, self.broadcasts = tuple(pullbacks), broadcasts
        self._index = {op: i for i, op in enumerate((*pullbacks, "out"))}
        self._pullbacks = [
            None if f is None else _Pullback(f, self.operands) for f in pullbacks.values()
        ]

    def keeps(self):
        each = [f"{op}: {', '.join(p.keeps) or 'nothing'}" for op, p in self._by_operand() if p]
        return each[0].partition(": ")[2] if len(each) == 1 else "; ".join(each) or "nothing"

    def _by_operand(self):
        return zip(self.operands, self._pullbacks)

    def reached(self, site):
        if len(site.active) != len(self.operands):
            raise TypeError(
                f"A rule names every operand of its primitive, got {len(self.operands)} "
                f"({', '.join(self.operands)}) expected {len(site.active)} for {site.name!r}: give "
                f"the missing ones, None for those without gradient ({self.where})."
            )
        return tuple(a and p is not None for a, p in zip(site.active, self._pullbacks))

    def declared(self, site):
        reached = zip(self._pullbacks, self.reached(site))
        return tuple(sorted({self._index[k] for p, r in reached if p and r for k in p.keeps}))

    def prepare(self, site):
        keep = self.declared(site)
        calls = [
            p and r and (p, [keep.index(self._index[k]) for k in p.keeps], p.statics(self, site))
            for p, r in zip(self._pullbacks, self.reached(site))
        ]

        def backward(kept, _, douts):
            return [c[0](douts, [kept[i] for i in c[1]], c[2]) if c else None for c in calls]

        return Step(keep, backward)


class _Pullback:
    """A pullback with its signature read once."""

    def __init__(self, fun, operands):
        parameters = inspect.signature(fun).parameters.values() if callable(fun) else ()
        first, *rest = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] or [None]
        if first is None:
            raise TypeError(
                "A pullback is a function of the result's cotangent, got "
                f"{fun!r} expected as in x=lambda dy, out: ..., or None for no gradient."
            )
        self.fun, self.all_results, self.keeps = fun, first == "dys", tuple(rest)
        self._statics = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
        if unknown := [k for k in self.keeps if k not in (*operands, "out")]:
            raise TypeError(
                f"A pullback's parameters are its cotangent, operands or 'out', got {unknown[0]!r} "
                f"expected one of {(*operands, 'out')}: make parameters of the primitive "
                "keyword-only."
            )

    def statics(self, rule, site) -> dict[str, Any]:
        known = dict(site.params, out_aval=site.out_avals[0])
        known.update({f"{op}_aval": a for op, a in zip(rule.operands, site.in_avals)})
        values = {name: known.get(name, default) for name, default in self._statics}
        if missing := [n for n, v in values.items() if v is inspect.Parameter.empty]:
            raise TypeError(
                f"A pullback asks only for parameters its primitive has, got {missing[0]!r} "
                f"expected one of {sorted(known)} in the rule for {rule.name!r} ({rule.where})."
            )
        return values

    def __call__(self, douts, kept, statics):
        return self.fun(tuple(douts) if self.all_results else douts[0], *kept, **statics)


class Pair(Rule):
    """A rule over all operands at once, which may compute something extra in the forward.

    backward: ``(site, kept, *result cotangents) -> one cotangent or None per operand``.
    keep: ``site -> indices into (*operands, *results)`` of the values that ``kept`` is a tuple of.
    forward: ``(site, *operands) -> (results, extra)``; without it the equation runs as it stands.
      With it ``kept`` is ``extra``, or after what is named by ``keep`` come the members of it.
    formulation: ``site -> str``, see `Rule.formulation`.
    """

    def __init__(
        self, name, math, backward, forward=None, keep=lambda site: (), keeps=None,
        formulation=lambda site: "",
    ):
        super().__init__(name, math, backward, forward)
        self._backward, self._forward, self._keep, self._keeps = backward, forward, keep, keeps
        self._formulation = formulation

    def keeps(self):
        return self._keeps or "nothing"

    def declared(self, site):
        return tuple(self._keep(site)) if self._forward is None else None

    def formulation(self, site):
        return self._formulation(site)

    def prepare(self, site):
        keep, forward = tuple(self._keep(site)), None
        if self._forward is not None:
            forward = lambda *operands: self._forward(site, *operands)

        def backward(kept, extra, douts):
            if forward is not None:
                kept = (*kept, *extra) if keep else extra
            return self._backward(site, kept, *douts)

        return Step(keep, backward, forward)


def rule(name: str, math: str = "", /, **pullbacks: Callable | None) -> Rule:
    """A rule with one pullback per operand, in operand order; None for an operand without gradient.

    Args:
      name: the primitive's name as it stands in a jaxpr (``"tanh"``), or a library function's
        (``"jax.nn.relu"``).
      math: the forward and backward formula, what is kept and why, and the value at a kink.
      **pullbacks: ``operand=lambda dy, ...``; see this module's docstring for parameter names.

    Returns:
      A `Rule`, to be put in a table: `fbprop.register` or `fbprop.table.override`.

    Raises:
      TypeError: if a pullback asks for a value that is neither operand nor ``out``.

    Example:
      >>> import fbprop, jax.numpy as jnp
      >>> straight_through = fbprop.rule("round", "y = round x;  x̄ = ȳ", x=lambda dy: dy)
      >>> float(fbprop.grad(jnp.round, rules=fbprop.table.override(straight_through))(1.3))
      1.0
    """
    return Pullbacks(name, math, pullbacks)


def broadcasting(name, math, /, **pullbacks):
    """Like `rule`, for primitives whose operands may be scalars or have size-1 dimensions."""
    return Pullbacks(name, math, pullbacks, broadcasts=True)


def elementwise(name, math, pullback):
    """One operand, ``x``, same shape as the result."""
    return Pullbacks(name, math, {"x": pullback})


def linear(name, math, pullback):
    """One operand, ``x``, in which the result is linear: nothing but its type is ever needed."""
    return Pullbacks(name, math, {"x": pullback})


def pair(name, math, backward, *args, **options):
    """All operands at once, optionally with a forward that keeps more: see `Pair`."""
    return Pair(name, math, backward, *args, **options)


def no_gradient(reason, *names):
    """One rule per name: results do not depend differentiably on operands."""
    if not names:
        raise TypeError(
            f"no_gradient takes a reason and names, got {reason!r} alone expected a name after it."
        )
    return [NoGradient(name, reason) for name in names]
