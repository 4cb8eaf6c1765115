"""What flows: statistics of values and cotangents from the pass that makes the gradient.

The function is traced and planned once to see which values are differentiated (`points`), and once
more with a tap on each of them (`rerun`). It stays one pass in either direction. What is seen is
read where the values are made, so that a norm costs one more reading of the array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
from jax.tree_util import tree_leaves

from fbprop import rules as _rules
from fbprop.core.arguments import check_function, check_input, cotangent_one, indices, positions
from fbprop.core.table import Table
from fbprop.core.tap import TAP
from fbprop.reverse import vjp
from fbprop.watch.points import leaves, points
from fbprop.watch.report import Report, flowed
from fbprop.watch.rerun import numbers, run
from fbprop.watch.statistics import finite, max_abs, norm, zeros
from fbprop.watch.traced import Traced

ALL = (norm, max_abs, zeros, finite)


def value_and_grad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    where: str = "*",
    of: Sequence[Callable] = ALL,
    rules: Table | None = None,
    fallback: str | None = "registered",
) -> Callable:
    """`fbprop.value_and_grad` that also reports what flowed, forward and backward.

    Watched are results of equations that a differentiated value passes through: products,
    convolutions, operations, sums; of a chain in one scope (a product, its bias, an activation,
    pooling, a sum) the last one, for the others are mostly never made. What only moves numbers (a
    transpose, a look-up) is not watched, nor `jax.nn.log_softmax`, for the same reason. Of loops,
    branches, calls and `shard_map` the inside is watched, of the last on each device; functions
    with a custom derivative as a whole.

    Args:
      fun: returns a scalar (or ``(scalar, aux)`` with ``has_aux``). It is traced: Python does not
        see values, as under `jax.jit`.
      argnums, has_aux, rules, fallback: see `fbprop.value_and_grad`.
      where: a shell-style pattern on path and name of an equation, as for `Table.override`:
        ``"encoder/*"``, ``"*dot_general"``; a chain is then one of equations that match. ``"*"``:
        all but those of derivatives that ``fun`` itself takes.
      of: statistics: functions from an array to a small array. Those of integers and booleans are
        reported in float32.

    Returns:
      A function of ``fun``'s arguments that returns ``((value, gradient), report)``, the former as
      `fbprop.value_and_grad`, `report` a `fbprop.watch.Report`.

    Raises:
      TypeError: as `fbprop.value_and_grad`; a statistic is not a function.
      ValueError: no equation matches the pattern; two statistics have one name.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fbprop import watch
      >>> def loss(w, x):
      ...     with jax.named_scope("layer"):
      ...         h = jax.nn.relu(x @ w)
      ...     return jnp.sum(h ** 2)
      >>> both, report = watch.value_and_grad(loss, of=[watch.norm, watch.zeros])(
      ...     jnp.ones(2), jnp.array([[3.0, 1.0], [-1.0, 0.0]]))
      >>> print(report)
      path   primitive    type        norm  zeros  d norm  d zeros
      layer  jax.nn.relu  float32[2]     4    0.5       8      0.5
             reduce_sum   float32[]     16      0       1        0
    """
    check_function(fun)
    of = (*checked(of), flowed)
    which, several = indices(argnums)

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def value_gradient_and_report(*args, **kwargs):
        chosen = positions(which, args)
        distinct = list(dict.fromkeys(chosen))
        for leaf in tree_leaves([args[i] for i in distinct]):
            check_input(jax.numpy.result_type(leaf), False, False)
        table = _rules.current() if rules is None else rules
        traced = Traced(fun, args, kwargs, distinct, has_aux, table, fallback)
        found = points(traced.plan, where, table)
        taps = numbers(found, of)

        def tapped(primals, taps):
            outs, seen = run(traced.plan, traced.inputs(primals), taps, of)
            return outs[0], (outs, seen)

        value, pullback, (outs, seen) = vjp(
            tapped, [args[i] for i in distinct], taps, has_aux=True,
            rules=table if "tap" in table else table.extend(TAP), fallback=fallback,
        )
        gradients, dtaps = pullback(cotangent_one(value, False))
        found_at = dict(zip(distinct, gradients))
        gradient = tuple(found_at[i] for i in chosen) if several else found_at[chosen[0]]
        value = (value, traced.aux(outs)) if has_aux else value
        names = tuple(f.__name__ for f in of)
        report = Report(
            tuple(leaves(found)), names[:-1], _by_name(seen, names), _by_name(dtaps, names)
        )
        return (value, gradient), report

    return value_gradient_and_report


def _by_name(tree, names):
    flat = tree_leaves(tree)
    return [dict(zip(names, flat[i : i + len(names)])) for i in range(0, len(flat), len(names))]


def checked(of) -> tuple[Callable, ...]:
    """The statistics, or what is wrong with them."""
    of = tuple(of)
    if wrong := [f for f in of if not (callable(f) and hasattr(f, "__name__"))]:
        raise TypeError(
            f"Statistics are named functions of an array, got {wrong[0]!r} expected e.g. "
            "watch.norm: define one with def."
        )
    names = [f.__name__ for f in of]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"Statistics are told apart by their names, got {names} expected one or more, all "
            "different: define each with def."
        )
    return of
