"""`jax.checkpoint` and its policies: what is kept, where, and that the gradient stays the same."""

import itertools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import fbprop
from fbprop.core import jaxcompat as jc

X = jnp.array([0.3, 0.7, 1.1])
POLICIES = jax.checkpoint_policies


def named(x):
    a = checkpoint_name(jnp.sin(x), "a")
    return checkpoint_name(jnp.cos(a) * a, "b")


def straight(x):
    return jnp.sum(named(x))


def loop(x):
    return jnp.sum(jax.lax.scan(lambda c, _: (named(c), named(c * c)), x, None, length=2)[1])


def branch(x):
    def other(x):
        return jnp.exp(checkpoint_name(x * x, "b"))

    return jnp.sum(jax.lax.cond(x[0] > 0, named, other, x))


def branch_in_loop(x):
    def step(c, _):
        y = jax.lax.cond(c[0] > 0.25, lambda x: jax.nn.silu(named(x)), jnp.exp, c)
        return y, None

    return jnp.sum(jax.lax.scan(step, x, None, length=3)[0])


def offloaded(saved=(), away=("a",)):
    return POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=saved, names_which_can_be_offloaded=away,
        offload_src="device", offload_dst="pinned_host",
    )


def only(*names):
    return POLICIES.save_only_these_names(*names)


def kept(fun, policy):
    """Sizes of what the pullback holds besides the argument, and in which memory."""
    _, pullback = fbprop.vjp(jax.checkpoint(fun, policy=policy), X)
    kinds = [(x.size, x.sharding.memory_kind) for x in jax.tree.leaves(pullback)]
    kinds.remove((3, "device"))  # the argument
    return sorted(kinds)


@pytest.mark.parametrize("prevent_cse", [True, False])
@pytest.mark.parametrize("policy", [
    None, POLICIES.nothing_saveable, POLICIES.everything_saveable, only("a"), only("b"),
    offloaded(), offloaded(("b",)),
], ids=["none", "nothing", "everything", "a", "b", "a away", "b kept, a away"])
@pytest.mark.parametrize("fun", [straight, loop, branch, branch_in_loop])
def test_the_gradient_stays_the_same(fun, policy, prevent_cse):
    again = jax.checkpoint(fun, policy=policy, prevent_cse=prevent_cse)
    got, expected = jax.jit(lambda x: (fbprop.grad(again)(x), jax.grad(fun)(x)))(X)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize(("fun", "policy", "expected"), [
    (straight, None, []),
    (straight, only("a"), [(3, "device")]),
    (straight, offloaded(), [(3, "pinned_host")]),
    (straight, offloaded(("b",)), [(3, "pinned_host")]),  # no rule needs b again
    (straight, POLICIES.everything_saveable, [(3, "device")] * 2),  # cos a, and a twice
    (loop, None, []),
    (loop, only("a"), [(6, "device")] * 2),
    (loop, offloaded(), [(6, "pinned_host")] * 2),
    (loop, offloaded(("b",)), [(6, "device"), *[(6, "pinned_host")] * 2]),  # b is the next carry
    (branch, None, []),
    (branch, only("b"), [(3, "device")]),  # b or x², in one slot
    (branch, offloaded(("b",)), [(3, "device"), (3, "pinned_host")]),
    (branch_in_loop, None, []),
    (branch_in_loop, only("a"), [(9, "device")]),
    (branch_in_loop, offloaded(), [(9, "pinned_host")]),
])
def test_what_the_policy_names_is_kept_and_no_more(fun, policy, expected):
    assert kept(fun, policy) == expected


@pytest.mark.parametrize(("policy", "sines"), [(None, 2), (only("a"), 1), (offloaded(), 1)])
def test_what_is_saved_is_not_computed_again(policy, sines):
    def gradient(x):
        return fbprop.grad(jax.checkpoint(loop_of_sines, policy=policy))(x)

    def loop_of_sines(x):
        return jnp.sum(jax.lax.scan(
            lambda c, _: (checkpoint_name(jnp.sin(c), "a") ** 2, None), x, None, length=2)[0])

    assert str(jax.make_jaxpr(gradient)(X)).count(" sin ") == sines


def test_dots_are_saved_inside_a_loop():
    def fun(w, x):
        return jnp.sum(jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0])

    w, policy = jnp.eye(3) * 0.5, POLICIES.dots_saveable
    _, pullback = fbprop.vjp(jax.checkpoint(fun, policy=policy), w, X)
    assert sorted(x.size for x in jax.tree.leaves(pullback)) == [3, 9, 15]


def test_a_second_derivative_through_what_was_offloaded():
    def product(fun):
        return lambda x: jnp.vdot(fbprop.grad(fun)(x), jnp.cos(x))

    again = jax.checkpoint(straight, policy=offloaded())
    expected = jax.grad(product(straight))(X)
    chex.assert_trees_all_close(jax.jit(fbprop.grad(product(again)))(X), expected, rtol=1e-5)


def several_from_a_loop(c, xs):
    """A carry, one that is a result too, an operand, and what rules ask for again."""

    def step(c, x):
        h, k = c
        a = checkpoint_name(jnp.sin(h * x), "a")
        return (a * k, k + jnp.sum(a)), (a, jnp.exp(-a * k), x)

    (h, k), (a, e, x) = jax.lax.scan(step, (c, jnp.sum(c)), xs)
    return a, e, h, k, x


def several_from_a_branch(c, xs):
    def left(c, xs):
        a = checkpoint_name(jnp.sin(c), "a")
        return a, jnp.cos(a) * c, jnp.exp(xs)

    return jax.lax.cond(c[0] > 0, left, lambda c, xs: (c, jnp.exp(c), xs * c), c, xs)


def several_from_parts(c, xs):
    part = jax.checkpoint(lambda c: (jnp.tanh(checkpoint_name(c * c, "a")), jnp.cos(c)))
    a, b = part(c)
    count = jax.lax.while_loop(lambda n: n < 2, lambda n: n + 1, 0)
    return (a, *jax.jit(part)(b), xs * count)


@pytest.mark.parametrize("policy", [None, POLICIES.everything_saveable, only("a")],
                         ids=["none", "everything", "a"])
@pytest.mark.parametrize("fun", [several_from_a_loop, several_from_a_branch, several_from_parts])
def test_any_of_the_results_may_be_used(fun, policy):
    """All subsets are traced; the values are compared for the last result, and for a pair."""
    args = X, jnp.stack([X, X * X])
    n = len(jax.eval_shape(fun, *args))

    def gradients(grad, fun, subsets):
        loss = lambda used: lambda *args: sum(jnp.sum(fun(*args)[i] ** 2) for i in used)
        return lambda *args: [grad(loss(used), (0, 1))(*args) for used in subsets]

    again = jax.checkpoint(fun, policy=policy)
    subsets = [c for r in range(n) for c in itertools.combinations(range(n), r + 1)]
    jax.eval_shape(gradients(fbprop.grad, again, subsets), *args)
    ours, theirs = (
        jax.jit(gradients(grad, f, subsets[n - 1 : n + 1]))(*args)
        for grad, f in [(fbprop.grad, again), (jax.grad, fun)]
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(("fun", "expected"), [
    (lambda x: jnp.tanh(x), [3]),  # x, not the result
    (lambda x, y: jnp.sin(x) + y, [3]),  # not what is only added
    (lambda x, y: x * 2.0 + y, []),
])
def test_only_what_it_is_computed_from_again_is_kept(fun, expected):
    args = (X, X + 1.0)[: fun.__code__.co_argcount]
    _, pullback = fbprop.vjp(jax.checkpoint(fun), *args)
    assert [x.size for x in jax.tree.leaves(pullback)] == expected


def test_operands_that_need_not_be_tied_are_not():
    def barriers(prevent_cse):
        fun = jax.checkpoint(lambda x, y: jnp.sin(jnp.sin(x) * y), prevent_cse=prevent_cse)
        jaxpr = jax.make_jaxpr(fbprop.vjp(fun, X, X)[1])(X)
        inner = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier"]
        return [len(eqn.invars) for eqn in inner]

    assert barriers(False) == []
    assert barriers(True) == [3]  # two operands and the cotangent
    if jc.cpu_respects_barriers():  # jax 0.12, where it can be said of each operand
        assert barriers((False, True)) == [2]
        assert barriers((False, False)) == []
