"""The hand-written rules by family, and the table they make."""

from __future__ import annotations

from fbprop.core.rule import Rule
from fbprop.core.table import Table
from fbprop.rules import (
    arithmetic,
    attend,
    collective,
    complex_numbers,
    contraction,
    control,
    convolution,
    cumulative,
    delegated,
    elementwise,
    implicit,
    indexing,
    library_functions,
    linalg,
    loop,
    ordering,
    reduction,
    remat,
    shape,
    shard,
    special,
    window,
)

FAMILIES = (
    elementwise,
    arithmetic,
    shape,
    reduction,
    contraction,
    attend,
    convolution,
    window,
    cumulative,
    indexing,
    ordering,
    special,
    complex_numbers,
    linalg,
    control,
    remat,
    loop,
    implicit,
    collective,
    shard,
    delegated,
    library_functions,
)

table = Table(rule for family in FAMILIES for rule in family.RULES)
_current = table


def current() -> Table:
    """The default table: the built-in rules and what was registered."""
    return _current


def register(*rules: Rule) -> None:
    """Add rules to the default table, for primitives of your own or in place of built-in ones.

    Functions that were already jitted keep the rules they were traced with; to change a single
    call, pass ``rules=fbprop.table.override(...)`` to it instead.

    Args:
      *rules: from `fbprop.rule` and its kin.

    Raises:
      TypeError: for something that is not a rule.
      ValueError: two rules have the same name, or there is no function of a dotted name.

    Example:
      >>> import fbprop
      >>> fbprop.register(fbprop.rule("my_primitive", "y = 2 x;  x̄ = 2 ȳ", x=lambda dy: 2 * dy))
    """
    global _current
    _current = _current.extend(*rules)
