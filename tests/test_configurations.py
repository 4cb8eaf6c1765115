"""Rows under JAX's settings: what JAX's gradient does under one, ours does as well.

All tests run under strict dtype promotion; test_rules.py has every row with 64-bit types, these are
without. Settings that a trace shows are tried for every row. Where operations have to run one by
one, which takes a second a row, it is every 24th of them, every sixth for leaks, and of our own
operations those that have several forms, or one of each.
"""

import contextlib

import jax
from programs.compare import young_heap

import fbprop
from cases import CASES
from fbprop.check import random_cotangent
from fbprop.core.operation import Operation

WIDE = {"dot_general-preferred", "convert_element_type-complex"}  # ask for 64 bits themselves
ROWS = [case for case in CASES if case.id not in WIDE]
OPERATIONS = [case for case in ROWS if isinstance(fbprop.table.get(case.name), Operation)]
ONE_EACH = list({case.name: case for case in OPERATIONS}.values())
LOWERED = [case for case in ONE_EACH if case.name in (
    "attention", "dropout", "linear_cross_entropy", "normalize")]  # `fbprop.core.devices`


def operands(case):
    """In 32 bits, and a cotangent of the row's results."""
    primals = [jax.device_put(v) for v in case.values()]
    return primals, random_cotangent(jax.eval_shape(case.fun, *primals))


def cotangents(ad, case, primals, cotangent):
    return [d for d in ad.vjp(case.fun, *primals)[1](cotangent) if d.dtype != jax.dtypes.float0]


def types(ad, *row):
    return jax.eval_shape(lambda: cotangents(ad, *row))


def refuses(ad, run, case, given, setting):
    try:
        with setting():
            run(ad, case, *given)
    except Exception:
        return True
    return False


def failures(rows, run, setting):
    """Rows with which ``run`` fails under a setting with our derivatives and not with JAX's."""
    failed, done = [], 0
    for case in rows:
        given = operands(case)
        try:
            with setting():
                run(fbprop, case, *given)
            done += 1
        except Exception as error:
            if case not in OPERATIONS and refuses(jax, run, case, given, setting):
                continue  # the row itself, or JAX
            failed.append(f"{case.id}: {error!r}")
    assert done > 0.8 * len(rows)
    return failed


def test_every_rule_without_broadcasting_of_ranks():
    failed = failures(ROWS, types, lambda: jax.numpy_rank_promotion("raise"))
    assert not failed, "\n".join(failed)


def test_rules_leak_no_tracers():
    with young_heap():
        failed = failures([*ROWS[::6], *ONE_EACH], types, jax.checking_leaks)
    assert not failed, "\n".join(failed)


def one_by_one():
    stack = contextlib.ExitStack()
    stack.enter_context(jax.disable_jit())
    stack.enter_context(jax.debug_nans(True))
    return stack


def test_rules_operation_by_operation_without_nan():
    """Nowhere on the way to a cotangent is there one without JAX having it too."""
    failed = failures([*ROWS[::24], *LOWERED], cotangents, one_by_one)
    assert not failed, "\n".join(failed)
