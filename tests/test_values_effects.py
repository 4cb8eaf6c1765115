"""What a function that looks at values does beside its results: effects, errors, memory, leaks."""

import gc
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from programs.compare import young_heap
from test_values import V, assert_same, branch, outcome, root

import fbprop


def effects(module, log):
    def called(name, value=None):
        log.append((name, np.asarray(value).tolist()))
        return np.float32(2.0)

    number = jax.ShapeDtypeStruct((), jnp.float32)

    def fun(x):
        called("start")
        jax.debug.callback(partial(called, "debug"), 2 * x)
        called("between")
        if x > 0:
            jax.debug.callback(partial(called, "ordered"), x, ordered=True)
            called("positive")
        y = io_callback(partial(called, "io"), number, lax.stop_gradient(x))
        called("then")
        z = jax.pure_callback(partial(called, "pure"), number, x > 1)
        jax.debug.callback(partial(called, "constant"), 1.0)
        called("end")
        return x * y * z

    gradient = module.grad(fun)(3.0)
    jax.effects_barrier()
    return gradient


def test_effects_happen_once_and_in_order():
    ours, theirs = [], []
    np.testing.assert_allclose(effects(fbprop, ours), effects(jax, theirs))
    assert ours == theirs
    assert len(ours) == 10


def test_debug_print_stands_where_it_is_written(capfd):
    def fun(x):
        print("before", flush=True)
        jax.debug.print("x = {x}", x=x * 2)
        jax.effects_barrier()
        print("after", flush=True)
        return x * x

    fbprop.grad(fun)(2.0)
    assert capfd.readouterr().out.split("\n") == ["before", "x = 4.0", "after", ""]


def test_operations_that_depend_on_no_input_are_done_at_once():
    """So a cache or a state of the user's gets an array, not a tracer that outlives its trace."""
    state = {"key": jax.random.key(0)}

    def fun(x):
        if "mask" not in state:
            state["mask"] = jnp.tril(jnp.ones((2, 2)))
        state["key"], key = jax.random.split(state["key"])
        return jnp.sum(x * state["mask"]) * jax.random.normal(key)

    ours = [fbprop.grad(fun)(2.0) for _ in range(2)]
    assert not isinstance(state["mask"], jax.core.Tracer)
    state.clear()
    state["key"] = jax.random.key(0)
    np.testing.assert_allclose(ours, [jax.grad(fun)(2.0) for _ in range(2)])


def test_disable_jit():
    with jax.disable_jit():
        for fun in (
            root,
            lambda x: lax.cond(x > 0, lambda y: y * y if y > 1 else y, lambda y: y, x),
            lambda x: lax.scan(lambda c, _: (c * x if c > 0 else c, None), x, None, length=3)[0],
            lambda x: lax.while_loop(lambda c: c < 9, lambda c: c * x, x),
            jax.jit(branch),
        ):
            assert_same(outcome(fbprop, fun, 2.0), outcome(jax, fun, 2.0))


def custom_jvp(runs, body=True, rule=True):
    @jax.custom_jvp
    def fun(x):
        return x * x if not body or x > 0 else x

    @fun.defjvp
    def fun_jvp(primals, tangents):
        (x,), (dx,) = primals, tangents
        runs.append("rule")
        return fun(x), dx * (2 * x if not rule or x > 0 else 1.0)

    return fun


def custom_vjp(runs, body=True, rule=True):
    @jax.custom_vjp
    def fun(x):
        return x * x if not body or x > 0 else x

    def forward(x):
        runs.append("forward")
        return (x * x if not rule or x > 0 else x), x

    def backward(x, dy):
        runs.append("backward")
        return (dy * (2 * x if not rule or (x > 0 and dy > 0) else 1.0),)

    fun.defvjp(forward, backward)
    return fun


@pytest.mark.parametrize("make", [custom_jvp, custom_vjp])
@pytest.mark.parametrize("where", [(True, False), (False, True), (True, True)])
def test_functions_with_a_derivative_of_their_own(make, where):
    def both(module):
        runs = []
        fun = make(runs, *where)
        loss = lambda x: fun(x * 1.5) * x + fun(x)
        found = [module.value_and_grad(loss)(2.0), module.grad(module.grad(loss))(2.0), fun(2.0)]
        del runs[:]
        module.grad(fun)(2.0)
        return found, runs

    (ours, runs), (theirs, expected) = both(fbprop), both(jax)
    assert_same(ours, theirs)
    assert make is custom_jvp or runs == expected
    with pytest.raises(jax.errors.TracerBoolConversionError, match="A value is not known"):
        jax.jit(fbprop.grad(make([], *where)))(2.0)


def test_errors_of_planning_wait_until_a_result_depends_on_them():
    table = fbprop.Table(r for r in fbprop.table.values() if r.name != "sin")
    once = lambda x: x * x if jnp.sin(x) > 0 else x
    np.testing.assert_allclose(fbprop.grad(once, rules=table)(2.0), 4.0)
    with pytest.raises(fbprop.MissingRule, match="none for 'sin'.*test_values_effects.py"):
        fbprop.grad(lambda x: (lambda y: y if y > 0 else x)(jnp.sin(x)), rules=table)(2.0)


def test_exceptions_pass_and_leave_nothing():
    class Mine(Exception):
        pass

    alive = []

    def fun(x):
        y = x * x
        alive.append(weakref.ref(y))
        if y > 1:
            raise Mine("here")
        return y

    with young_heap():  # the heap of a long run takes 7 seconds to collect
        with pytest.raises(Mine, match="^here$"):
            fbprop.grad(fun)(2.0)
        gc.collect()
    assert alive[0]() is None
    np.testing.assert_allclose(fbprop.grad(branch)(2.0), 24.0)


def test_no_tracer_leaks():
    special, held = jax.custom_vjp(lambda x: x * x), []
    special.defvjp(lambda x: (x * x, x), lambda x, dy: (2 * x * dy,))
    with jax.checking_leaks(), young_heap():
        for fun in (branch, fbprop.grad(branch)):
            fbprop.vjp(fun, 2.0)[1](1.0)
        for fun in (jax.nn.relu, jax.nn.silu, special):  # whose derivatives JAX keeps for later
            fbprop.vjp(fun, 2.0)[1](1.0)
            jax.jit(lambda x: fbprop.vjp(fun, x)[1](1.0))(2.0)
        with pytest.raises(Exception, match="Leaked trace"):
            fbprop.grad(lambda x: held.append(x * 2) or x)(2.0)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        held[0] + 1.0


def test_values_that_nobody_holds_are_freed():
    """One more layer takes one more kept activation, and nothing else, however often it asks."""
    def peak(asks, layers):
        found = []

        def fun(x):
            for _ in range(layers):
                x = jnp.tanh(jnp.exp(x * 0.5) + 1.0) + 2.0
                if asks:
                    assert x[0, 0] > 0
                    found.append(sum(a.nbytes for a in jax.live_arrays()))
            return jnp.sum(x)

        before = sum(a.nbytes for a in jax.live_arrays())
        _, pullback = fbprop.vjp(fun, jnp.ones((64, 64)))
        kept = sum(a.nbytes for a in jax.tree.leaves(pullback.kept))
        return max(found, default=before) - before, kept

    one = 64 * 64 * 4
    (most, kept), (_, without) = peak(True, 5), peak(False, 5)
    assert most <= kept + 3 * one
    assert kept <= without + one


def test_factored_cotangents_of_a_function_that_asks():
    table, labels = jnp.ones((7, 3)), jnp.array([1, 2])

    def fun(t):
        rows = t[labels]
        return jnp.sum(rows * 2.0) if jnp.all(rows > 0) else jnp.sum(t)

    (found,) = fbprop.vjp(fun, table, factored=fbprop.Rows)[1](1.0)
    assert isinstance(found, fbprop.Rows)
    np.testing.assert_allclose(found.dense(), jax.grad(fun)(table))
    twice = lambda t: fun(t) + jnp.sum(t[labels])
    (found,) = fbprop.vjp(twice, table, factored=True)[1](1.0)
    np.testing.assert_allclose(fbprop.core.factored.dense(found), jax.grad(twice)(table))


def test_a_function_that_asks_nothing_is_one_piece():
    library = lambda x: jnp.sum(jax.nn.gelu(x) * jnp.where(x > 0, x, 0.0) ** 2.0)
    assert len(fbprop.vjp(library, V)[1].plans) == 1
    assert len(fbprop.vjp(lambda x: branch(x) * x, 2.0)[1].plans) == 1
    assert len(fbprop.vjp(lambda x: branch(branch(x)), 2.0)[1].plans) == 2
