"""The table against the test rows, both ways, and against what JAX itself can differentiate."""

import contextlib
import importlib
import pkgutil
import warnings

import jax
import jax.experimental
import jax.extend.core.primitives
import jax.numpy as jnp
import jax.scipy.special
import pytest
from jax import lax
from jax._src.interpreters import ad

import fbprop
from cases import CASES
from fbprop.core.fallback import Fallback
from fbprop.core.operation import Operation
from fbprop.core.rule import NoGradient
from fbprop.rules.delegated import Delegated, Refused

# What JAX differentiates and fbprop does not, and why: README, "Differences from JAX".
OUTSIDE = {
    **dict.fromkeys(
        ("accum_grad_in_ref", "addupdate", "empty_ref", "free_ref", "freeze", "get", "get_global",
         "masked_load", "masked_swap", "new_ref", "run_state", "swap"),
        "mutable references: a derivative of stateful code is not a rule about one equation",
    ),
    **dict.fromkeys(
        ("box_get", "box_set", "new_box", "log_extend", "log_read", "new_log"),
        "boxes: experimental, stateful, internal to jax 0.10",
    ),
}


# One rule, `Call`, serves them all. JAX cannot go back through the first two, so there is nothing
# to compare with (test_engine.py has their values); no public function makes the others.
CALLS = {"composite", "custom_vmap_call", "call", "closed_call", "eval_jaxpr"}


def own_rules():
    without = (NoGradient, Delegated, Refused, Fallback)
    named = {name for name, rule in fbprop.table.items() if not isinstance(rule, without)}
    return named - CALLS


# JAX's own attention rounds scores to float32, and rows are in float64: test_ops_attention.py.
ROW_OF_THE_OPERATION = {"jax.nn.dot_product_attention"}

# jax 0.10 gives complex sign the gradient 0 and nextafter none: test_limits.py checks both there
# against finite differences; on 0.12 they have rows like any other.
RIGHT_ONLY_IN_0_12 = {"sign", "nextafter"} if jax.__version_info__ < (0, 12) else set()


def test_every_rule_has_a_row_and_every_row_a_rule():
    # Rules for primitives of the other supported JAX have their rows there.
    here = {name for name in own_rules()
            if "." in name or name in primitives() or isinstance(fbprop.table[name], Operation)}
    assert here - RIGHT_ONLY_IN_0_12 - ROW_OF_THE_OPERATION == {case.name for case in CASES}


TABLES = (
    "primitive_jvps", "primitive_transposes", "fancy_transposes", "primitive_linearizations"
)


def registered():
    """Names of all primitives this JAX has a derivative or a transpose for, experimental as well.

    These become known as their modules are imported: all are, but those that are for one platform.
    """
    with warnings.catch_warnings(action="ignore"):
        for module in pkgutil.walk_packages(jax.experimental.__path__, "jax.experimental."):
            if "mosaic" not in module.name and not module.name.endswith("_test"):
                with contextlib.suppress(ImportError):  # of what is not installed
                    importlib.import_module(module.name)
    names = {p.name for t in TABLES for p in getattr(ad, t)}
    # "vjp_node[jit]" and such are made as functions run; "test_..." by other tests.
    return {n for n in names if "[" not in n and not n.startswith("test_")}


def primitives():
    """Those, and what JAX exports."""
    exported = {p.name for p in vars(jax.extend.core.primitives).values() if hasattr(p, "bind")}
    return registered() | exported | {"custom_vjp_call"}


def test_every_primitive_jax_differentiates_has_a_rule():
    missing = sorted(registered() - set(fbprop.table) - set(OUTSIDE))
    assert not missing, f"jax {jax.__version__} differentiates these; the table does not: {missing}"


def test_what_is_outside_is_outside_and_says_so():
    assert not set(OUTSIDE) & set(fbprop.table)

    def stateful(x):
        ref = jax.new_ref(x)
        ref[...] = ref[...] * 2.0
        return ref[...]

    with pytest.raises(fbprop.MissingRule, match="got none for 'get'"):
        fbprop.grad(stateful)(1.0)


def written_in_a_loop(x):
    ref = jax.new_ref(jnp.zeros(()))

    def step(c, _):
        ref[...] = ref[...] + c
        return c * x, None

    lax.scan(step, x, None, length=2)
    return ref[...]


def written_in_a_call(x):
    ref = jax.new_ref(jnp.zeros(()))

    @jax.jit
    def write(x):
        ref[...] = x * 2.0

    write(x)
    return ref[...]


def only_written(x):
    ref = jax.new_ref(jnp.zeros(()))
    ref[...] = x
    return x * x


def only_read(x):
    ref = jax.new_ref(jnp.ones(()) * 3.0)
    return lax.scan(lambda c, _: (c * ref[...], None), x, None, length=2)[0]


def test_what_is_written_to_a_reference_and_read_is_refused_and_never_zero():
    for fun in (written_in_a_loop, written_in_a_call):
        with pytest.raises(fbprop.MissingRule, match="got none for 'get'"):
            fbprop.grad(fun)(2.0)
    assert fbprop.grad(only_written)(2.0) == 4.0
    assert fbprop.grad(only_read)(2.0) == 9.0
