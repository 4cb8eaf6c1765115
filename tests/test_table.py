"""What a table and its rules accept: nothing that would then silently do nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import fbprop
from fbprop import rules

SAME = lambda dy: dy
KINDS = {
    "rule": lambda name: [fbprop.rule(name, "", x=SAME)],
    "broadcasting": lambda name: [fbprop.broadcasting(name, "", x=SAME)],
    "elementwise": lambda name: [fbprop.elementwise(name, "", SAME)],
    "linear": lambda name: [fbprop.linear(name, "", SAME)],
    "pair": lambda name: [fbprop.pair(name, "", lambda site, kept, dy: [dy])],
    "no_gradient": lambda name: fbprop.no_gradient("discrete", name),
}
NEAREST = {
    "tahn": "'tanh'", "jax.nn.rleu": "'jax.nn.relu'", "bcoo_dense": "'bcoo_todense'",
    "pmaxx": "'pmax'", "no.such.function": "none is similar", "": "none is similar",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [None, "encoder/*"])
def test_an_override_names_what_exists_or_says_what_is_near(kind, where):
    for name, near in NEAREST.items():
        with pytest.raises(ValueError, match=f"what exists.* got '{name}' .*nearest: .*{near}"):
            fbprop.table.override(*KINDS[kind](name), where=where)
    for name in ("tanh", "jax.nn.relu", "bcoo_todense", "pmax", "jax.numpy.tanh"):
        fbprop.table.override(*KINDS[kind](name), where=where)


def test_a_primitive_that_jax_knows_may_be_overridden_and_any_added():
    known, unknown = Primitive("test_known"), Primitive("test_unknown")
    mlir.register_lowering(known, lambda *_: None)
    for p in (known, unknown):
        p.def_abstract_eval(lambda x: x)
        p.def_impl(lambda x: x)
    triple = lambda name: fbprop.rule(name, "y = 3x", x=lambda dy: 3.0 * dy)
    gradient = lambda p, table: float(fbprop.grad(p.bind, rules=table)(1.0))
    assert gradient(known, fbprop.table.override(triple("test_known"))) == 3.0
    with pytest.raises(ValueError, match=r"fbprop.register or Table.extend"):
        fbprop.table.override(triple("test_unknown"))
    table = fbprop.table.extend(triple("test_unknown"))
    assert gradient(unknown, table) == 3.0
    assert gradient(unknown, table.override(fbprop.rule("test_unknown", "", x=SAME))) == 1.0


def test_what_was_registered_stays_under_overrides(monkeypatch):
    monkeypatch.setattr(rules, "_current", rules.table)
    fbprop.register(fbprop.rule("sin", "", x=lambda dy: 5.0 * dy))
    table = fbprop.table.override(fbprop.rule("cos", "", x=lambda dy: 7.0 * dy))
    assert float(fbprop.grad(lambda x: jnp.sin(x) + jnp.cos(x), rules=table)(0.3)) == 12.0
    with pytest.raises(AttributeError, match="no attribute 'tables'"):
        _ = fbprop.tables


def test_one_rule_per_name_and_patterns_that_can_match():
    sin = fbprop.rule("sin", "", x=SAME)
    for put in (fbprop.table.override, fbprop.table.extend, fbprop.register):
        with pytest.raises(ValueError, match="one rule per name, got 2 rules for 'sin'"):
            put(sin, sin)
    for put in (fbprop.table.extend, fbprop.register):
        with pytest.raises(ValueError, match="got 'jax.nn.tahn' .* nearest"):
            put(fbprop.rule("jax.nn.tahn", "", x=SAME))
        with pytest.raises(TypeError, match="got int expected fbprop.Rule"):
            put(3)
    with pytest.raises(ValueError, match="got '' expected one that can match"):
        fbprop.table.override(sin, where="")
    with pytest.raises(TypeError, match=r"got \['a/\*'\] expected a string"):
        fbprop.table.override(sin, where=["a/*"])


@pytest.mark.parametrize(("make", "match"), [
    (lambda: fbprop.rule(jnp.sin, "", x=SAME), "as name expected a string"),
    (lambda: fbprop.rule("sin", SAME), "as mathematics expected a string"),
    (lambda: fbprop.linear(SAME, "", "sin"), "as name expected a string"),
    (lambda: fbprop.rule("sin", "", x=3), r"got 3 expected as in x=lambda dy"),
    (lambda: fbprop.rule("sin", "", x=0), r"got 0 expected as in x=lambda dy"),
    (lambda: fbprop.rule("sin", "", x=lambda: 0), "the result's cotangent, got <function"),
    (lambda: fbprop.rule("sin", "", out=SAME), "got an operand of that name .* for 'sin'"),
    (lambda: fbprop.rule("sin", "", x=lambda dy, *others: dy), "got 'others' expected one of"),
    (lambda: fbprop.no_gradient("sin"), "got 'sin' alone expected a name after it"),
])
def test_rules_that_are_none(make, match):
    with pytest.raises(TypeError, match=match):
        make()


@pytest.mark.parametrize("kind", ["rule", "elementwise", "linear", "broadcasting", "pair"])
def test_a_rule_for_another_number_of_operands(kind):
    table = fbprop.table.override(*KINDS[kind]("mul"))
    with pytest.raises(TypeError, match="got 1 .*expected 2"):
        fbprop.grad(lambda x: x * x, rules=table)(1.0)


def test_explain_says_which_patterns_met_nothing():
    def fun(x):
        with jax.named_scope("encoder"):
            y = jax.lax.scan(lambda c, _: (jnp.cos(c), None), x, None, length=2)[0]
            return jnp.sign(jnp.sin(x)) + y

    sin, cos = (fbprop.rule(name, "", x=SAME) for name in ("sin", "cos"))
    table = fbprop.table.override(sin, cos, where="encoder/*")
    table = table.override(*fbprop.no_gradient("flat", "sign"), where="*/sign")
    found = fbprop.explain(fun, 1.0, rules=table)
    assert found.unmet == ()
    assert "no equation" not in str(found)
    misspelt = table.override(sin, where="enc").override(cos, where="x/*")
    found = fbprop.explain(fun, 1.0, rules=misspelt)
    assert found.unmet == (("enc", "sin"), ("x/*", "cos"))
    assert "no equation met the override of 'sin' where 'enc'" in str(found)
    np.testing.assert_allclose(fbprop.grad(fun, rules=table)(1.0), 1.0)
