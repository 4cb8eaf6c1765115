"""Forms of a computation, one of them for programs that run on a single device (of a platform).

Which one is chosen when a program is lowered: nobody knows before how it will be laid out, and what
is fast on one device may have to send what another form leaves where it is. Merging the dimensions
of [T, B, H] that a product sums over takes 3% of the time from ``gpt_step`` on a CPU; of an LSTM
whose batch is shared by 8 devices it takes 6 times the bytes sent (`tests/test_collectives.py`).
"""

from __future__ import annotations

import jax
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from fbprop.core import jaxcompat as jc


def by_devices(*operands, one, several):
    """``one(*operands)`` in a program for one device, ``several(*operands)`` in one for more."""
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
        return one(*operands)
    return lax.cond(on_one_device_p.bind(), one, several, *operands)


def by_platform(*operands, default, **forms):
    """`jax.lax.platform_dependent`, ``default`` in a program for several devices too."""
    chosen = {
        name: lambda *xs, form=form: by_devices(*xs, one=form, several=default)
        for name, form in forms.items()
    }
    return lax.platform_dependent(*operands, default=default, **chosen)


on_one_device_p = Primitive("on_one_device")
on_one_device_p.def_impl(lambda: True)
on_one_device_p.def_abstract_eval(lambda: ShapedArray((), bool))
mlir.register_lowering(
    on_one_device_p, lambda ctx: [mlir.ir_constant(np.bool_(jc.is_for_one_device(ctx)))]
)
