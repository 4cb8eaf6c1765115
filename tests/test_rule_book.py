"""`python -m fbprop.rules`: every rule is in it, with mathematics, what it keeps, and its place."""

import re

import pytest

from fbprop.rules import FAMILIES, current, table
from fbprop.rules.__main__ import book, main, page
from forked import run


def test_every_rule_is_in_the_book():
    text = book()
    for name, rule in table.items():
        assert f"\n{name}\n" in text
        assert rule.math, name
        assert re.search(r"\.py:\d+$", rule.where), (name, rule.where)
    # Tangents of operations that are registered are differentiated by JAX.
    mine = [n for n in current() if n in table or not n.endswith("_tangent")]
    assert all(f"\n{name}\n" in text for name in mine)
    assert len(mine) > len(table)
    assert text.endswith(f"{len(mine)} rules")
    assert len(table) == sum(len(family.RULES) for family in FAMILIES)  # each name in one family


@pytest.mark.parametrize("name", sorted(table))
def test_a_rule_in_full(name):
    assert page(name).startswith(name)


def test_pages_show_source_and_unknown_names_are_met_with_the_nearest(capsys):
    assert main(["div"]) == 0
    assert "b=lambda dy, b, out: -dy * out / b" in capsys.readouterr().out
    assert main(["rotary"]) == 0  # of an operation, which is registered
    assert "turned(dy, positions, -1, base, interleaved)" in capsys.readouterr().out
    assert main(["tanhh"]) == 1
    assert "no rule for 'tanhh', did you mean: tanh" in capsys.readouterr().err


def test_command():
    done = run("-m", "fbprop.rules", "div")
    assert done.returncode == 0, done.stderr
    assert "b̄ = −ȳ y / b" in done.stdout
