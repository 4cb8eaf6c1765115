"""The table and the rows name the same primitives, in both directions."""

import fbprop
from cases import CASES
from fbprop.rule import NoGradient


def test_every_rule_has_a_row_and_every_row_a_rule():
    rules = {name for name, rule in fbprop.table.items() if not isinstance(rule, NoGradient)}
    assert rules == {case.name for case in CASES}
