"""Rows of rules/window.py."""

import numpy as np
from jax import lax

from cases.case import Case, apart, real


def pool(name, label, shape, window, strides, padding="VALID", *, make=apart, kept=None, **more):
    init, fun = {
        "max": (-np.inf, lax.max), "min": (np.inf, lax.min), "sum": (0.0, lax.add),
    }[name]

    def reduced(x):
        init_value = np.asarray(init, x.dtype)
        return lax.reduce_window(x, init_value, fun, window, strides, padding, **more)

    return Case(f"reduce_window_{name}", reduced, (make(*shape),), label, kept=kept)


CASES = [
    pool("max", "2x2", (2, 6, 4, 3), (1, 2, 2, 1), (1, 2, 2, 1), kept=2 * 3 * 2 * 3),
    pool("max", "3x3 stride 2", (2, 7, 5, 3), (1, 3, 3, 1), (1, 2, 2, 1), "SAME", kept=2 * 4 * 3 * 3),
    pool("min", "3x3 stride 2", (2, 7, 5, 3), (1, 3, 3, 1), (1, 2, 2, 1), "SAME", kept=2 * 4 * 3 * 3),
    pool("sum", "3x3 stride 2", (2, 7, 5, 3), (1, 3, 3, 1), (1, 2, 2, 1), "SAME", make=real),
    pool("sum", "dilated", (2, 7, 5), (1, 3, 2), (1, 2, 1), ((0, 1), (2, 0), (1, 1)), make=real,
         base_dilation=(1, 2, 3), window_dilation=(1, 2, 3)),
]
