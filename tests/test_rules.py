"""Every check of every rule, written once; the rows are in tests/cases."""

import functools

import fbprop
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from fbprop import jaxcompat as jc
from fbprop.check import compare, finite_differences, random_cotangent
from fbprop.rule import Rule, Step

by_case = pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.id, marks=pytest.mark.xdist_group(c.id)) for c in CASES]
)
LOW = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}


def test_ids_are_unique():
    assert len({c.id for c in CASES}) == len(CASES)


def cast(values, dtype):
    """Float operands in another precision, complex ones in the one that goes with it."""
    wide = jnp.complex128 if dtype == "float64" else jnp.complex64

    def one(v):
        if jnp.issubdtype(v.dtype, jnp.complexfloating):
            return v.astype(wide)
        return v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v

    return tuple(one(jnp.asarray(v)) for v in values)


def cotangent_of(case, primals, seed=0):
    return random_cotangent(jax.eval_shape(case.fun, *primals), seed)


def ours(case, primals, cotangent, rules=None):
    return fbprop.vjp(case.fun, *primals, rules=rules)[1](cotangent)


@functools.lru_cache(4)
def reference(case):
    """(primals, cotangent, jax's cotangents, finite differences or None) in float64."""
    with jax.enable_x64(True):
        primals = cast(case.values(), "float64")
        cotangent = cotangent_of(case, primals)
        by_jax = jax.jit(lambda p, d: jax.vjp(case.fun, *p)[1](d))(primals, cotangent)
        near = finite_differences(case.fun, primals, cotangent) if case.differences else None
    return primals, cotangent, by_jax, near


def rows(case, got):
    """Comparisons with both references."""
    primals, _, by_jax, near = reference(case)
    found = compare(primals, got, by_jax, "jax", case.tolerance.get("jax", 1e-12))
    if near is not None:
        found += compare(primals, got, near, "differences", case.tolerance.get("differences", 1e-8))
    return found


def assert_ok(found):
    bad = [str(row) for row in found if not row.ok]
    assert not bad, "\n".join(bad)


@by_case
def test_matches_jax_and_finite_differences(case, x64):
    primals, cotangent, *_ = reference(case)
    got = ours(case, primals, cotangent)
    assert_ok(rows(case, got))
    assert_ok(rows(case, jax.jit(lambda p, d: ours(case, p, d))(primals, cotangent)))


@by_case
def test_uses_the_rule_under_test(case, x64):
    assert case.name in {rule.name for _, rule in _sites(_plan(case).steps)}


def _plan(case):
    primals = cast(case.values(), "float64")
    return fbprop.vjp(case.fun, *primals)[1].plan


def _sites(steps):
    """Every differentiated equation and its rule, in inner jaxprs as well."""
    for site, rule, _ in filter(None, steps):
        yield site, rule
        for _, inner in jc.sub_jaxprs(site.eqn.params):
            active = [jc.differentiable(a) for a in jc.in_avals(inner)]
            wanted = [True] * len(jc.out_avals(inner))
            yield from _sites(site.engine.plan(inner, active, wanted).steps)


@by_case
def test_lower_precision_is_close_to_float64(case, x64):
    primals, cotangent, *_ = reference(case)
    for dtype in case.dtypes:
        low = cast(primals, dtype)
        low_ct = jax.tree.map(
            lambda d, y: d if d.dtype == jax.dtypes.float0 else jnp.asarray(d, y.dtype),
            cotangent, jax.eval_shape(case.fun, *low),
        )
        got = jax.jit(lambda p, d: ours(case, p, d))(low, low_ct)
        for g, p in zip(got, low):
            assert g.shape == p.shape
            assert g.dtype == (p.dtype if jc.differentiable(p) else jax.dtypes.float0)
        # The reference sees the rounded operands: what is measured is the rule, not the rounding.
        wide = cast(low, "float64")
        ct64 = jax.tree.map(
            lambda d, y: d if d.dtype == jax.dtypes.float0 else d.astype(y.dtype),
            low_ct, jax.eval_shape(case.fun, *wide),
        )
        expected = jax.jit(lambda p, d: jax.vjp(case.fun, *p)[1](d))(wide, ct64)
        assert_ok(compare(low, got, expected, dtype, case.tolerance.get(dtype, LOW[dtype])))


@by_case
def test_order_two(case, x64):
    """Gradient of a function of the gradient: ours in ours, ours in JAX's, against JAX's in JAX's."""
    primals, cotangent, *_ = reference(case)
    real = [i for i, p in enumerate(primals) if jc.differentiable(p)]

    def second(outer, inner):
        def scalar(*moving):
            values = list(primals)
            for i, v in zip(real, moving):
                values[i] = v
            cts = inner(case.fun, *values)[1](cotangent)
            return sum(
                jnp.sum(jnp.real(cts[i] * cts[i]) / 2 + jnp.real(cts[i])) for i in real
            )

        return outer(scalar, tuple(range(len(real))))

    moving = [primals[i] for i in real]
    if case.order == 1:
        with pytest.raises((NotImplementedError, ValueError), match="differentiation|derivative"):
            second(jax.grad, jax.vjp)(*moving)
        return
    expected = jax.jit(second(jax.grad, jax.vjp))(*moving)
    tolerance = case.tolerance.get("order2", 1e-11)
    for outer, inner in ((fbprop.grad, fbprop.vjp), (jax.grad, fbprop.vjp)):
        got = jax.jit(second(outer, inner))(*moving)
        assert_ok(compare(tuple(moving), got, expected, "order 2", tolerance))


@by_case
def test_vmap_is_a_loop(case, x64):
    sets = [cast(case.values(seed), "float64") for seed in (0, 1)]
    cts = [cotangent_of(case, p, seed) for seed, p in enumerate(sets)]
    stack = lambda *xs: np.stack(xs) if xs[0].dtype == jax.dtypes.float0 else jnp.stack(xs)
    batched = jax.tree.map(stack, *sets), jax.tree.map(stack, *cts)
    if not case.vmap:
        with pytest.raises(NotImplementedError, match="[Bb]atching"):
            jax.vmap(case.fun)(*batched[0])
        return
    got = jax.jit(jax.vmap(lambda p, d: _floats(ours(case, p, d))))(*batched)
    for i, (p, d) in enumerate(zip(sets, cts)):
        one = jax.tree.map(lambda x: x[i], got)
        expected = _floats(jax.jit(lambda p, d: jax.vjp(case.fun, *p)[1](d))(p, d))
        assert_ok(compare(_floats(p), one, expected, "vmap", case.tolerance.get("jax", 1e-12)))


def _floats(values):
    return tuple(v for v in values if v.dtype != jax.dtypes.float0 and jc.differentiable(v))


@by_case
def test_special_points(case, x64):
    for operands, expected in case.at:
        primals = cast(operands, "float64")
        one = jax.tree.map(jnp.ones_like, jax.eval_shape(case.fun, *primals))
        got = ours(case, primals, one)
        for i, value in expected.items():
            np.testing.assert_array_equal(got[i], np.broadcast_to(value, got[i].shape))


@by_case
def test_keeps_what_it_declares(case, x64):
    """Bytes in the pullback against the declaration, for the equation by itself."""
    primals, *_ = reference(case)
    pullback = fbprop.vjp(case.fun, *primals)[1]
    kept = sum(x.nbytes for x in jax.tree.leaves(pullback.kept))
    if case.kept is not None:
        assert kept == case.kept
        return
    declared = {}
    for site, rule, _ in filter(None, _plan(case).steps):
        indices = rule.declared(site)
        assert indices is not None, f"give {case.id} the bytes that {rule} keeps"
        atoms = (*site.eqn.invars, *site.eqn.outvars)
        declared.update((atoms[i], None) for i in indices if jc.is_var(atoms[i]))
    assert kept == sum(v.aval.size * v.aval.dtype.itemsize for v in declared)


class Spoiled(Rule):
    """A rule with an error planted in the cotangent of one operand."""

    def __init__(self, rule, operand, spoil):
        self.__dict__.update(rule.__dict__)
        self.rule, self.operand, self.spoil = rule, operand, spoil
        self.broadcasts, self.takes_zeros = rule.broadcasts, rule.takes_zeros

    def active_out(self, site):
        return self.rule.active_out(site)

    def reached(self, site):
        return self.rule.reached(site)

    def prepare(self, site):
        step = self.rule.prepare(site)

        def backward(kept, extra, douts):
            dins = list(step.backward(kept, extra, douts))
            if dins[self.operand] is not None and not isinstance(dins[self.operand], type(fbprop.ZERO)):
                dins[self.operand] = self.spoil(dins[self.operand])
            return dins

        return Step(step.keep, backward, step.forward)


def _one_element(d):
    """The largest element off by 1e-6 of itself."""
    flat = d.reshape(-1)
    return flat.at[jnp.argmax(jnp.abs(flat))].multiply(1 + 1e-6).reshape(d.shape)


PLANTED = {
    "scaled by 1 + 1e-6": lambda d: d * (1 + 1e-6),
    "one element off": _one_element,
    "zero": jnp.zeros_like,
}


@by_case
def test_the_checker_catches_planted_errors(case, x64):
    primals, cotangent, by_jax, near = reference(case)
    rule = fbprop.table[case.name]
    site = next(site for site, used in _sites(_plan(case).steps) if used is rule)
    planted = 0
    for operand in [i for i, a in enumerate(site.in_avals) if site.reached[i] and a.size]:
        for what, spoil in PLANTED.items():
            table = fbprop.table.override(Spoiled(rule, operand, spoil))
            got = ours(case, primals, cotangent, table)
            found = rows(case, got)
            for against in {r.against for r in found}:
                caught = any(not r.ok for r in found if r.against == against)
                assert caught, f"{what} in operand {operand} passes against {against}"
            planted += 1
    assert planted
