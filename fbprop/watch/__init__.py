"""What a backward pass can report besides gradients."""

from fbprop.watch import curvature, per_example
from fbprop.watch.flow import value_and_grad
from fbprop.watch.report import Report
from fbprop.watch.statistics import finite, max_abs, norm, zeros

__all__ = [
    "Report", "curvature", "finite", "max_abs", "norm", "per_example", "value_and_grad", "zeros",
]
