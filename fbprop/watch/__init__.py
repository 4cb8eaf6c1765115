"""What a backward pass can report besides gradients."""

from fbprop.watch import curvature, per_example
from fbprop.watch.flow import value_and_grad
from fbprop.watch.history import Every, every
from fbprop.watch.keeping import Keeping, KeptValue, kept
from fbprop.watch.nonfinite import NonFinite, Origin, first_nonfinite
from fbprop.watch.page import page
from fbprop.watch.report import Report
from fbprop.watch.statistics import finite, max_abs, norm, zeros

__all__ = [
    "Every", "Keeping", "KeptValue", "NonFinite", "Origin", "Report", "curvature", "every",
    "finite", "first_nonfinite", "kept", "max_abs", "norm", "page", "per_example",
    "value_and_grad", "zeros",
]
