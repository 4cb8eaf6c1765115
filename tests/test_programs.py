"""Random programs agree with JAX; a wrong rule is found, and shown in its smallest program."""

import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from programs.compare import Trial
from programs.program import Line, Program, Type
from programs.run import look
from programs.shrink import shrunk

import fbprop

EACH = 8


@pytest.fixture(autouse=True)
def as_a_user():
    """JAX's own defaults; its warnings about programs are the programs' business."""
    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("seed", range(0, 240, EACH))
def test_random_programs_agree_with_jax(seed):
    reports = [f"seed {s}\n{r}" for s in range(seed, seed + EACH) if (r := look(s))]
    assert not reports, "\n\n".join(reports)


def with_rule(*rules):
    """fbprop with other rules."""
    table = fbprop.table.override(*rules)
    return types.SimpleNamespace(vjp=lambda f, *primals: fbprop.vjp(f, *primals, rules=table))


def trial_of(*expressions, ours, dtype="float32"):
    lines = tuple(Line(f"v{i}", e) for i, e in enumerate(expressions))
    program = Program("f", {"x0": Type((3,), dtype)}, lines, (lines[-1].target,))
    return Trial(program, "second order", "leaks", ours=ours)


@pytest.mark.parametrize("factor", [1 + 1e-3, 0.0, float("nan")])
def test_a_wrong_rule_is_found_and_shown_alone(factor):
    wrong = fbprop.rule("sin", "", x=lambda dy, x: factor * dy * jnp.cos(x))
    found = trial_of(
        "jnp.tanh(x0)", "v0 * 2.0", "jnp.sin(v1) + v0", "v2[::-1] * x0", ours=with_rule(wrong)
    )
    assert found.difference().startswith("leaf")
    small = shrunk(found)
    assert small.program.source() == "def f(x0):\n    v2 = jnp.sin(x0) + x0\n    return v2,"
    assert (small.transform, small.setting) == ("plain", "none")


def test_a_wrong_type_and_a_wrong_error_are_found():
    def refuses(dy):
        raise KeyError("x")

    found = trial_of("jnp.sin(x0)", ours=with_rule(fbprop.rule("sin", "", x=refuses)))
    assert "fbprop refuses: KeyError" in found.difference()
    halved = types.SimpleNamespace(
        vjp=lambda f, *p: (f(*p), lambda d: tuple(x.astype("float16") for x in p))
    )
    assert "is of type" in trial_of("jnp.sin(x0)", ours=halved).difference()
    refused = trial_of("jnp.sin(x0) @ jnp.ones(5)", ours=fbprop)
    assert refused.difference() is None  # both, with the same error


def test_an_error_of_rounding_is_not_a_disagreement_and_one_beyond_it_is():
    off = lambda by: with_rule(fbprop.rule("sin", "", x=lambda dy, x: by * dy * jnp.cos(x)))
    plain = lambda ours: trial_of("jnp.sin(x0)", ours=ours)._replace(transform="plain")
    assert plain(off(1 + 2**-23)).difference() is None
    assert plain(off(1 + 2**-15)).difference()
