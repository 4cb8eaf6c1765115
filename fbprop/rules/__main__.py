"""The rule book: ``python -m fbprop.rules`` lists every rule, ``... tanh`` shows one in full."""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
import textwrap

from fbprop.core.fallback import Fallback
from fbprop.rules import FAMILIES, current


def entry(rule) -> str:
    """Name, mathematics, what is kept and where the rule stands."""
    math = textwrap.fill(rule.math, 96, initial_indent="    ", subsequent_indent="    ")
    return f"{rule.name}\n{math}\n    keeps {rule.keeps()}   [{rule.where}]"


def book() -> str:
    """Every rule, by family; last those of operations, which are registered."""
    parts = []
    for family in FAMILIES:
        title = inspect.getdoc(family).partition("\n")[0]
        parts.append("\n".join([f"== {title}", *map(entry, family.RULES)]))
    listed = {rule.name for family in FAMILIES for rule in family.RULES}
    own = [r for n, r in current().items() if n not in listed and not isinstance(r, Fallback)]
    parts.append("\n".join(["== Operations of fbprop, and rules that were registered.",
                            *map(entry, own)]))
    return "\n\n".join([*parts, f"{len(listed) + len(own)} rules"])


def page(name: str) -> str:
    """One rule with its source.

    Raises:
      KeyError: there is no rule of that name; the message names the nearest.
    """
    table = current()
    if name not in table:
        near = ", ".join(difflib.get_close_matches(name, table, 3)) or "none similar"
        raise KeyError(f"The table has no rule for {name!r}, did you mean: {near}?")
    return "\n\n".join([entry(table[name]), *map(inspect.getsource, table[name].sources())])


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fbprop.rules", description=__doc__)
    parser.add_argument("names", nargs="*", help="rules to show in full; default: list all")
    names = parser.parse_args(arguments).names
    try:
        print("\n\n".join(map(page, names)) if names else book())
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
