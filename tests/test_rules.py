"""Every check of every rule, written once; the rows are in tests/cases.

Almost all the time goes into compiling, so whatever a row needs is compiled as one function, of no
arguments: XLA then computes nearly all of it by its own evaluator while it compiles, and makes no
code for it, which takes a third of the time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from cases import CASES
from fbprop.check import compare, finite_differences, random_cotangent
from fbprop.core import cotangent as ct
from fbprop.core import jaxcompat as jc
from fbprop.core.rule import Rule, Step

# Of this scope, so that the tests of one row follow one another, and on one worker: they share
# what was computed for it.
by_case = pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.id) for c in CASES], scope="module"
)
LOW = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}
FLOAT0 = jax.dtypes.float0


def test_ids_are_unique():
    assert len({c.id for c in CASES}) == len(CASES)


def cast(values, dtype):
    """Float operands in another precision, complex ones in the one that goes with it."""
    wide = jnp.complex128 if dtype == "float64" else jnp.complex64

    def one(v):
        if jnp.issubdtype(v.dtype, jnp.complexfloating):
            return v.astype(wide)
        return v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v

    return tuple(one(v if isinstance(v, jax.Array) else np.asarray(v)) for v in values)


def like(cotangent, out):
    """A cotangent in the precision of another output."""
    return jax.tree.map(lambda d, y: d if d.dtype == FLOAT0 else d.astype(y.dtype), cotangent, out)


def rounded(value):
    """The nearest number with 8 bits, which every precision represents: one reference for all."""
    if np.iscomplexobj(value):
        return rounded(value.real) + 1j * rounded(value.imag)
    if value.dtype == FLOAT0 or not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    return np.asarray(value).astype(jnp.bfloat16).astype(value.dtype)


def ours(case, primals, cotangent, rules=None):
    return fbprop.vjp(case.fun, *primals, rules=rules)[1](cotangent)


def theirs(case, primals, cotangent):
    return jax.vjp(case.plain or case.fun, *primals)[1](cotangent)


def floats(values):
    return tuple(v for v in values if v.dtype != FLOAT0 and jc.differentiable(jax.typeof(v)))


@functools.lru_cache(16)
def operands(case, seed=0):
    """(primals, a random cotangent) in float64."""
    primals = cast(map(rounded, map(np.asarray, case.values(seed))), "float64")
    cotangent = random_cotangent(jax.eval_shape(case.fun, *primals), seed)
    return primals, jax.tree.map(lambda d: rounded(np.asarray(d)), cotangent)


def second_order(outer, inner, case, primals, cotangent, fun=None):
    """Gradient of a function of the gradient."""
    fun = fun or case.fun
    real = [i for i, p in enumerate(primals) if jc.differentiable(jax.typeof(p))]

    def scalar(*moving):
        values = list(primals)
        for i, v in zip(real, moving):
            values[i] = v
        cts = inner(fun, *values)[1](cotangent)
        return sum(jnp.sum(jnp.real(cts[i] * cts[i]) / 2 + jnp.real(cts[i])) for i in real)

    return outer(scalar, tuple(range(len(real))))(*[primals[i] for i in real])


def array(x):
    """As JAX gives it to a function; float0 is not a type of array for it."""
    return x if x.dtype == FLOAT0 else jax.device_put(x)


def low_precision(case, primals, cotangent, dtype):
    low = cast(primals, dtype)
    return ours(case, low, like(cotangent, jax.eval_shape(case.fun, *low)))


def under_jax(case, p, d, found):
    """An operation by JAX's own transformations, and the same of its plain code: pairs.

    Two of these of its plain code have been ``found`` already.
    """
    tangents = tuple(
        jnp.cos(x) if jc.differentiable(jax.typeof(x)) else np.zeros(x.shape, FLOAT0) for x in p)
    of_batch = lambda fun: lambda *x: jax.vmap(fun)(*(jnp.stack([a, a]) for a in x))
    twice = jax.tree.map(lambda y: jnp.stack([y, y]), d)
    already = {"reverse": floats(found["jax"]), "second order": found.get("second", (None,))[0]}
    return {
        what: (by(case.fun), already[what] if what in already else by(case.plain))
        for what, by in {
            "value": lambda fun: fun(*p),
            "reverse": lambda fun: floats(jax.vjp(fun, *p)[1](d)),
            "forward": lambda fun: jax.jvp(fun, p, tangents)[1],
            "second order": lambda fun: second_order(jax.grad, jax.vjp, case, p, d, fun),
            "batch within": lambda fun: floats(jax.vjp(of_batch(fun), *p)[1](twice)),
        }.items() if case.order == 2 or what != "second order"
    }


@functools.lru_cache(8)
def results(case):
    """Every cotangent the checks look at, in one compilation, for NumPy, which compiles nothing."""
    plain = operands(case), operands(case, 1)
    given = jax.tree.map(array, plain)
    stack = lambda *xs: np.stack(xs) if xs[0].dtype == FLOAT0 else jnp.stack(xs)
    planted = errors(case)

    def run(p):
        d = given[0][1]
        found = {"ours": ours(case, p, d), "jax": theirs(case, p, d)}
        found["low"] = {dtype: low_precision(case, p, d, dtype) for dtype in case.dtypes}
        found["spoiled"] = spoiled(case, p, d, planted)
        if case.vmap:
            batch = jax.tree.map(stack, *given)
            found["vmap"] = jax.vmap(lambda s: floats(ours(case, *s)))(batch)
            found["other"] = theirs(case, *given[1])
        if case.order == 2:
            found["second"] = [
                second_order(jax.grad, jax.vjp, case, p, d, case.plain),
                second_order(fbprop.grad, fbprop.vjp, case, p, d),
            ]
        if case.plain:
            found["under jax"] = under_jax(case, p, d, found)
        if case.differences:
            found["differences"] = finite_differences(case.fun, p, d)
        return found

    p = given[0][0]
    found = jax.jit(lambda: run(p))() if case.evaluated else jax.jit(run)(p)
    return plain[0][0], jax.tree.map(np.asarray, found)


def rows(case, got):
    """Comparisons of float64 cotangents with both references."""
    primals, found = results(case)
    compared = compare(primals, got, found["jax"], "jax", case.tolerance.get("jax", 1e-12))
    if case.differences:
        tolerance = case.tolerance.get("differences", 1e-8)
        compared += compare(primals, got, found["differences"], "differences", tolerance)
    return compared


def assert_ok(compared):
    bad = [str(row) for row in compared if not row.ok]
    assert not bad, "\n".join(bad)


@by_case
def test_matches_jax_and_finite_differences(case, x64):
    assert_ok(rows(case, results(case)[1]["ours"]))


@by_case
def test_lower_precision_is_close_to_float64(case, x64):
    primals, found = results(case)
    for dtype, got in found["low"].items():
        low = cast(primals, dtype)
        for g, p in zip(got, low):
            assert g.shape == p.shape
            assert g.dtype == (p.dtype if jc.differentiable(p) else FLOAT0)
        assert_ok(compare(low, got, found["jax"], dtype, case.tolerance.get(dtype, LOW[dtype])))


@by_case
def test_order_two(case, x64):
    """Ours in ours against JAX's in JAX's."""
    if case.order == 1:
        primals, cotangent = operands(case)
        with pytest.raises((NotImplementedError, ValueError), match="(?i)differ|deriv|unimpl"):
            jax.eval_shape(
                lambda p: second_order(jax.grad, jax.vjp, case, p, cotangent), primals)
        return
    primals, found = results(case)
    expected, got = found["second"]
    tolerance = case.tolerance.get("order2", 1e-11)
    assert_ok(compare(floats(primals), got, expected, "order 2", tolerance))


@by_case
def test_vmap_is_a_loop(case, x64):
    primals, found = results(case)
    if not case.vmap:
        with pytest.raises(NotImplementedError, match="[Bb]atching"):
            jax.vmap(case.fun)(*[jnp.stack([p, p]) for p in primals])
        return
    for i, expected in enumerate((found["jax"], found["other"])):
        one = jax.tree.map(lambda x, i=i: x[i], found["vmap"])
        tolerance = case.tolerance.get("jax", 1e-12)
        assert_ok(compare(floats(primals), one, floats(expected), "vmap", tolerance))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in CASES if c.plain],
                         scope="module")
def test_operations_are_their_plain_code_to_jax(case, x64):
    _, found = results(case)
    for what, (got, expected) in found["under jax"].items():
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            scale = 1e-11 * max(1, float(np.abs(e).max(initial=0)))
            np.testing.assert_allclose(g, e, rtol=1e-11, atol=scale, err_msg=what)


@by_case
def test_special_points(case, x64):
    for values, expected in case.at:
        primals = cast(values, "float64")
        one = jax.tree.map(lambda y: np.ones(y.shape, y.dtype), jax.eval_shape(case.fun, *primals))
        got = jax.jit(lambda p=primals, d=one: ours(case, p, d))()
        for i, value in expected.items():
            np.testing.assert_array_equal(got[i], np.broadcast_to(value, got[i].shape))


@functools.lru_cache(8)
def pullback_type(case):
    """The pullback with types for arrays: what is kept, and the static plan."""
    primals, _ = operands(case)
    return jax.eval_shape(lambda *p: fbprop.vjp(case.fun, *p)[1], *primals)


def sites(steps):
    """Every differentiated equation and its rule, in inner jaxprs as well."""
    for site, rule, step in filter(None, steps):
        yield site, rule
        for both in step.inner:
            yield from sites(both.plan.steps)


@by_case
def test_uses_the_rule_under_test_and_keeps_what_it_declares(case, x64):
    pullback = pullback_type(case)
    assert case.name in {rule.name for _, rule in sites(pullback.plan.steps)}
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback.kept))
    if case.kept is not None:
        assert kept == case.kept
        return
    declared = {}
    for site, rule, _ in filter(None, pullback.plan.steps):
        indices = rule.declared(site)
        assert indices is not None, f"give {case.id} the bytes that {rule} keeps, now {kept}"
        atoms = (*site.eqn.invars, *site.eqn.outvars)
        declared.update((atoms[i], None) for i in indices if jc.is_var(atoms[i]))
    assert kept == sum(v.aval.size * v.aval.dtype.itemsize for v in declared)


class Spoiled(Rule):
    """A rule with errors at hand, ``[(operand, error)]``, of which one is in its cotangents."""

    def __init__(self, rule, errors, planted):
        self.__dict__.update(rule.__dict__)
        self.rule, self.errors, self.planted = rule, errors, planted
        self.broadcasts, self.takes_zeros = rule.broadcasts, rule.takes_zeros

    def active_out(self, site):
        return self.rule.active_out(site)

    def reached(self, site):
        return self.rule.reached(site)

    def prepare(self, site):
        step = self.rule.prepare(site)

        def backward(kept, extra, douts):
            right = [*map(ct.evaluated, step.backward(kept, extra, douts))]
            dins = list(right)
            for number, (operand, error) in enumerate(self.errors):
                if hasattr(right[operand], "dtype"):
                    wrong = PLANTED[error](right[operand])
                    dins[operand] = jnp.where(self.planted == number, wrong, dins[operand])
            return dins

        return Step(step.keep, backward, step.forward)


def one_element(d):
    """The largest element off by 1e-6 of itself."""
    flat = d.reshape(-1)
    largest = jnp.arange(flat.size) == jnp.argmax(jnp.abs(flat))
    return jnp.where(largest, flat * (1 + 1e-6), flat).reshape(d.shape)


PLANTED = {
    "scaled by 1 + 1e-6": lambda d: d * (1 + 1e-6),
    "one element off": one_element,
    "zero": jnp.zeros_like,
}


@functools.lru_cache(8)
def errors(case):
    """[(operand, what is wrong with its cotangent)], for every operand that has one."""
    site = next(
        site for site, used in sites(pullback_type(case).plan.steps)
        if used is fbprop.table[case.name]
    )
    return [
        (operand, error) for operand, aval in enumerate(site.in_avals)
        if site.reached[operand] and aval.size for error in PLANTED
    ]


def spoiled(case, primals, cotangent, planted):
    """Cotangents with each error in turn, of one trace: [error, *shape] where they are floats."""
    def one(number):
        rule = Spoiled(fbprop.table[case.name], planted, number)
        return floats(ours(case, primals, cotangent, fbprop.table.override(rule)))

    numbers = np.arange(len(planted))
    # What JAX has no second derivative of, it may not batch along every dimension either.
    return jax.vmap(one)(numbers) if case.vmap and case.order == 2 else jax.lax.map(one, numbers)


@by_case
def test_the_checker_catches_planted_errors(case, x64):
    _, found = results(case)
    for number, (operand, error) in enumerate(errors(case)):
        wrong = iter(found["spoiled"])
        got = [next(wrong)[number] if g.dtype != FLOAT0 else g for g in found["ours"]]
        compared = rows(case, got)
        for against in {row.against for row in compared}:
            caught = any(not row.ok for row in compared if row.against == against)
            assert caught, f"{error} in operand {operand} passes against {against}"
    assert errors(case)
