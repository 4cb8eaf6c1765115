"""All test rows, a module per family of rules.

A rule without a row, or a row without a rule, fails test_complete.py.
"""

import importlib
import pkgutil

from cases.case import Case

CASES: list[Case] = []
for module in pkgutil.iter_modules(__path__, "cases."):
    if module.name != "cases.case":
        CASES += importlib.import_module(module.name).CASES
