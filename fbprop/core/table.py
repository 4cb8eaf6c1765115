"""The table of rules: an immutable mapping from names to rules, and how a rule is found.

A name is a primitive's (``"tanh"``) or a library function's (``"jax.nn.relu"``); the latter is used
only where the equation provably is that function (`fbprop.core.library`). Overriding returns a new
table; a table is part of what a differentiated function is, so an override never meets a stale
compilation.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping

from fbprop.core import library
from fbprop.core.jaxcompat import has_derivative, primitive_names
from fbprop.core.outline import outlined
from fbprop.core.rule import Rule, Site


class MissingRule(NotImplementedError):
    """The table has no rule for a primitive that a differentiated value passes through."""

    def __init__(self, site: Site):
        operand = next(i for i, a in enumerate(site.active) if a)
        aval = site.in_avals[operand]
        way_out = "or pass fallback='jax' to let JAX differentiate this primitive."
        if not has_derivative(site.eqn.primitive):
            way_out = "or wrap the call in jax.custom_vjp: JAX has no derivative of it either."
        super().__init__(
            f"Every primitive between input and loss needs a rule, got none for {site.name!r}, "
            f"operand {operand} ({aval.str_short()}){site.location()}: register one with "
            f"fbprop.register(fbprop.rule({site.name!r}, ...)), {way_out}"
        )


class Table(Mapping):
    """An immutable mapping from name to `Rule`, with overrides that hold in some scopes only.

    Attributes:
      scoped: the overrides of the latter kind, as (pattern on the path, rule), the last first in
        rank; overridden: the names of all rules that were given to `override` or `extend`.

    Example:
      >>> import fbprop
      >>> fbprop.table["tanh"].math
      'y = tanh x; x̄ = ȳ(1 − y²)'
    """

    def __init__(self, rules=(), scoped: tuple[tuple[str, Rule], ...] = (), overridden=()):
        self._rules = {r.name: r for r in rules}
        self.scoped, self.overridden = tuple(scoped), frozenset(overridden)
        functions = [n for n in (*self._rules, *(r.name for _, r in scoped)) if "." in n]
        self._functions = {}
        for name in filter(self._as_a_whole, dict.fromkeys(functions)):
            self._functions.setdefault(name.rpartition(".")[2], []).append(name)

    def _as_a_whole(self, function):
        """Whether a library function's own rule is used: not if a part of it has another now."""
        return (
            not self.overridden
            or function in self.overridden
            or not self.overridden & library.parts(function)
        )

    def __getitem__(self, name):
        return self._rules[name]

    def __iter__(self):
        return iter(self._rules)

    def __len__(self):
        return len(self._rules)

    # Tables are compared by identity: they are keys of caches of compiled functions.
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other

    @property
    def is_scoped(self) -> bool:
        """Whether the rule of an equation depends on its path."""
        return bool(self.scoped)

    def override(self, *rules: Rule, where: str | None = None) -> Table:
        """A new table in which ``rules`` take the place of those of the same names.

        A library function that contains an overridden primitive is differentiated by its parts, so
        that the override holds there too, unless the function is overridden itself.

        Args:
          *rules: from `fbprop.rule` and its kin.
          where: a shell-style pattern on the path, e.g. ``"encoder/*"``; the path is the named
            scopes (`jax.named_scope`) joined by ``/``, the primitive or function name last. The
            last override that matches wins. None: everywhere. `fbprop.explain` says which
            patterns met nothing.

        Raises:
          TypeError: for something that is not a rule, or a pattern that is not a string.
          ValueError: there is nothing of a rule's name: no rule, primitive or library function; two
            rules have the same name; or the pattern is empty.

        Example:
          >>> import fbprop, jax, jax.numpy as jnp
          >>> no_flow = fbprop.rule("sin", "y = sin x;  x̄ = 0", x=lambda dy: None)
          >>> table = fbprop.table.override(no_flow, where="frozen/*")
          >>> def f(x):
          ...     with jax.named_scope("frozen"):
          ...         y = jnp.sin(x)
          ...     return y + jnp.sin(x)
          >>> float(fbprop.grad(f, rules=table)(0.0))
          1.0
        """
        for r in _checked(rules):
            if not (r.name in self or any(r.name == s.name for _, s in self.scoped)
                    or library.exists(r.name) or r.name in primitive_names()):
                raise ValueError(_unknown(r.name, {*self, *primitive_names()}))
        if where is None:
            return self.extend(*rules)
        scoped = (*self.scoped, *((_checked_pattern(where), r) for r in rules))
        return Table(self._rules.values(), scoped, self.overridden | {r.name for r in rules})

    def extend(self, *rules: Rule) -> Table:
        """A new table with these rules: `override` that takes new names, of primitives of your own.

        Raises:
          TypeError: for something that is not a rule.
          ValueError: two rules have the same name, or there is no function of a dotted name.

        Example:
          >>> import fbprop
          >>> mine = fbprop.rule("my_primitive", "y = 2 x;  x̄ = 2 ȳ", x=lambda dy: 2 * dy)
          >>> "my_primitive" in fbprop.table.extend(mine)
          True
        """
        for r in _checked(rules):
            if "." in r.name and r.name not in self and not library.exists(r.name):
                raise ValueError(_unknown(r.name, self))
        overridden = self.overridden | {r.name for r in rules}
        return Table((*self._rules.values(), *rules), self.scoped, overridden)

    def function(self, eqn) -> tuple[str | None, Mapping | None]:
        """The library function an equation is, of those that have a rule in any scope."""
        return library.identify(eqn, self._functions)

    def outlined(self, jaxpr):
        """The jaxpr with a call for each library function with a rule that was traced into it."""
        return outlined(jaxpr, self._functions)

    def find(self, eqn, path: str) -> tuple[Rule | None, Mapping | None]:
        """The rule of an equation and, for a library function, the arguments it was called with."""
        function, arguments = self.function(eqn)
        for name in (function, eqn.primitive.name):
            if name is None:
                continue
            full = f"{path}/{name}" if path else name
            if scoped := self.scoped_rule(name, full):
                return scoped[1], arguments if name == function else None
            if name in self._rules:
                return self._rules[name], arguments if name == function else None
        return None, None

    def scoped_rule(self, name, path) -> tuple[str, Rule] | None:
        """Of the overrides of that name, the last one whose pattern matches the path."""
        for where, r in reversed(self.scoped):
            if r.name == name and fnmatch.fnmatchcase(path, where):
                return where, r
        return None


def _checked(rules):
    for r in rules:
        if not isinstance(r, Rule):
            raise TypeError(
                f"A table holds rules, got {type(r).__name__} expected fbprop.Rule: make one "
                "with fbprop.rule(name, math, x=lambda dy, ...: ...)."
            )
    names = [r.name for r in rules]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(
            f"A table holds one rule per name, got {names.count(twice[0])} rules for {twice[0]!r} "
            "expected one: the last would have taken the place of the others."
        )
    return rules


def _checked_pattern(where):
    if not isinstance(where, str):
        raise TypeError(
            f"where is a pattern on the path, got {where!r} expected a string as 'encoder/*': "
            "call override once per pattern."
        )
    if not where:
        raise ValueError(
            "where is a pattern on the path, got '' expected one that can match, as '*' or "
            "'encoder/*': leave it out to override everywhere."
        )
    return where


def _unknown(name, names):
    near = ", ".join(map(repr, difflib.get_close_matches(name, names, 3))) or "none is similar"
    return (
        "An override names what exists, a rule, a primitive or a library function, got "
        f"{name!r} expected one of those (the nearest: {near}): correct the name, or give the rule "
        "of a new primitive to fbprop.register or Table.extend."
    )
