"""fbprop: reverse-mode differentiation for JAX as an open table of hand-written rules."""

from fbprop import data, learning, mesh, nn, ops, optim, rules, train, watch
from fbprop.check import CheckFailed, Report, check
from fbprop.core.cotangent import ZERO, CotangentError
from fbprop.core.factored import Contraction, Rows
from fbprop.core.rule import Rule, broadcasting, elementwise, linear, no_gradient, pair, rule
from fbprop.core.table import MissingRule, Table
from fbprop.explain import Explanation, explain
from fbprop.reverse import Pullback, grad, value_and_grad, vjp
from fbprop.rules import register

__version__ = "0.1.0"

__all__ = [
    "ZERO",
    "CheckFailed",
    "Contraction",
    "CotangentError",
    "Explanation",
    "MissingRule",
    "Pullback",
    "Report",
    "Rows",
    "Rule",
    "Table",
    "broadcasting",
    "check",
    "data",
    "elementwise",
    "explain",
    "grad",
    "learning",
    "linear",
    "mesh",
    "nn",
    "no_gradient",
    "ops",
    "optim",
    "pair",
    "register",
    "rule",
    "table",
    "train",
    "value_and_grad",
    "vjp",
    "watch",
]


def __getattr__(name):
    """`fbprop.table`: the default table as it is now, with what was registered."""
    if name == "table":
        return rules.current()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
