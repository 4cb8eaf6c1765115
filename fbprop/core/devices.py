"""Forms of a computation, one of them for programs that run on a single device (of a platform).

Which one is chosen when a program is lowered: nobody knows before how it will be laid out, and what
is fast on one device may have to send what another form leaves where it is. Merging the dimensions
of [T, B, H] that a product sums over takes 3% of the time from ``gpt_step`` on a CPU; of an LSTM
whose batch is shared by 8 devices it takes 6 times the bytes sent (`tests/test_collectives.py`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fbprop.core import jaxcompat as jc

PLATFORMS = {"cpu": "CPUs", "cuda": "NVIDIA GPUs", "tpu": "TPUs"}


def in_words(platform: str | None, form: str, only_on: str, elsewhere: str = "") -> str:
    """For `fbprop.explain`: the form that is taken on a platform, or where it would be.

    Args:
      platform: `fbprop.core.rule.Site.platform`.
      form: that of programs for one device of the platform ``only_on``; elsewhere: of others.
    """
    if platform is None:
        said = f"{form} on {PLATFORMS[only_on]}"
        return f"{said}, else {elsewhere}" if elsewhere else said
    return form if platform == only_on else elsewhere


def own_broadcasting():
    """`jax.numpy_rank_promotion` is the user's word about the user's arrays, not about ours."""
    return jax.numpy_rank_promotion("allow")


def by_devices(*operands, one, several, apart_from=()):
    """``one(*operands)`` in a program for one device, ``several(*operands)`` in one for more.

    Args:
      apart_from: platforms of which one device, too, takes the form for several.
    """
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
        return one(*operands)
    return lax.cond(on_one_device_p.bind(apart_from=apart_from), one, several, *operands)


def by_platform(*operands, default, **forms):
    """`jax.lax.platform_dependent`, ``default`` in a program for several devices too."""
    chosen = {
        name: lambda *xs, form=form: by_devices(*xs, one=form, several=default)
        for name, form in forms.items()
    }
    return lax.platform_dependent(*operands, default=default, **chosen)


def summed(x, axes):
    """``x`` summed over axes; what each device has of it then adds up in 16 bits if x has so many.

    XLA sums 16-bit numbers in float32 where it is told so and where not, but sends what it is told:
    of a norm's scale float32, apart from the products' 16 bits (33 collectives of 297 more in the
    step of a 7 B model on 8 H100s).
    """
    if x.dtype.itemsize != 2:
        return jnp.sum(x, axes)
    whole = lambda x: jnp.sum(x, axes)
    return by_devices(x, one=whole, several=lambda x: lax.reduce_sum(x, axes))


on_one_device_p = Primitive("on_one_device")
on_one_device_p.def_impl(lambda *, apart_from: True)
on_one_device_p.def_abstract_eval(lambda *, apart_from: ShapedArray((), bool))


def _said(platform):
    def lower(ctx, *, apart_from):
        alone = jc.is_for_one_device(ctx) and platform not in apart_from
        return [mlir.ir_constant(np.bool_(alone))]

    return lower


mlir.register_lowering(on_one_device_p, _said(None))
for platform in PLATFORMS:
    mlir.register_lowering(on_one_device_p, _said(platform), platform=platform)


def at_lowering(*operands, default, several=(), **forms):
    """``default(*operands)``, by another form where a program for one device of a platform is made.

    Where `by_platform` traces every form, and differentiates it, this traces a form when a program
    is lowered for its platform: one that only that platform can trace, or nobody differentiate.
    Derivatives are those of ``default``.

    Args:
      *operands: arrays.
      default: a function of them that returns a list of arrays.
      several: platforms whose form programs for several of its devices have, too.
      **forms: by platform, functions of the same that return the same types.
    """
    ours = {name: functools.partial(_ours, form) for name, form in sorted(forms.items())}
    return at_lowering_p.bind(
        *operands, default=functools.partial(_ours, default), several=several,
        forms=tuple(ours.items()))


def _ours(form, *xs):
    """Whenever it is traced: equations are made again where nothing of ours is on the stack."""
    with own_broadcasting():
        return list(form(*xs))


def _lowering(platform):
    def lower(ctx, *xs, default, several, forms):
        form = dict(forms).get(platform, default)
        chosen = form if platform in several or jc.is_for_one_device(ctx) else default
        return mlir.lower_fun(chosen, multiple_results=True)(ctx, *xs)

    return lower


def _types(*avals, default, several, forms):
    return jc.out_avals(jax.make_jaxpr(default)(*avals))


def _jvp(primals, tangents, *, default, several, forms):
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def moved(*values):
        at = dict(zip(moving, values))
        return default(*(at.get(i, x) for i, x in enumerate(primals)))

    return jax.jvp(moved, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(args, dims, *, default, several, forms):
    mapped = lambda f: jax.vmap(f, in_axes=tuple(dims))
    forms = {name: mapped(form) for name, form in forms}
    outs = at_lowering(*args, default=mapped(default), several=several, **forms)
    return outs, [0] * len(outs)


at_lowering_p = Primitive("at_lowering")
at_lowering_p.multiple_results = True


@at_lowering_p.def_impl
def _compiled(*xs, **params):
    if jax.config.jax_disable_jit:  # nothing is lowered
        return params["default"](*xs)
    return jax.jit(lambda *ys: at_lowering_p.bind(*ys, **params))(*xs)


at_lowering_p.def_abstract_eval(_types)
ad.primitive_jvps[at_lowering_p] = _jvp
batching.primitive_batchers[at_lowering_p] = _batch
mlir.register_lowering(at_lowering_p, _lowering(None))
for platform in ("cpu", "cuda", "tpu"):
    mlir.register_lowering(at_lowering_p, _lowering(platform), platform=platform)
