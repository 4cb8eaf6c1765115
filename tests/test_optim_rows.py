"""Unevaluated gradients in optimisers: the same updates, and no table of zeros on the way."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from test_optim import ALL

import fbprop
from fbprop import optim, train

IDS = jnp.array([[3, 1, 3], [0, 3, 1]])


def network(rows=11):
    keys = jax.random.split(jax.random.key(0))
    return {"w": jax.random.normal(keys[0], (rows, 5)), "b": jax.random.normal(keys[1], (5, 3))}


def loss(params, batch, key):
    return jnp.sum(jnp.sin(params["w"][batch] @ params["b"]) ** 2)


def looked_up(params):
    return loss(params, IDS, None)


@pytest.mark.parametrize("name", ALL)
def test_updates_are_those_of_arrays(name, x64):
    optimizer, params = ALL[name], network()
    state = states = optimizer.init(params)

    @jax.jit
    def both(state, states, params):
        factored = fbprop.grad(looked_up, factored=True)(params)
        assert type(factored["w"]) is fbprop.Rows
        assert type(factored["b"]) is fbprop.Contraction
        arrays = fbprop.grad(looked_up)(params)
        return (
            optimizer.update(factored, state, params), optimizer.update(arrays, states, params)
        )

    for _ in range(3):
        (updates, state), (expected, states) = both(state, states, params)
        chex.assert_trees_all_close((updates, state), (expected, states), rtol=1e-12, atol=1e-14)
        params = optim.apply_updates(params, updates)


@pytest.mark.parametrize("factored", [True, False])
def test_without_params(factored):
    optimizer, params = optim.adam(0.1), network()
    gradient = fbprop.grad(looked_up, factored=factored)(params)
    updates, _ = optimizer.update(gradient, optimizer.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


READS = {
    "repeated": (lambda t: t[IDS], True),
    "out of bounds": (lambda t: t.at[jnp.array([99, -11, -12, 2, 2])].get(mode="drop"), True),
    "clipped": (lambda t: t.at[jnp.array([99, 10, -99, 2, 2])].get(mode="clip"), True),
    "promised": (lambda t: t.at[jnp.array([9, 9, 2])].get(mode="promise_in_bounds"), True),
    "small integers": (lambda t: t[jnp.array([9, 9, 2], "int8")], True),
    "columns": (lambda t: t[:, jnp.array([1, 1, 4])], True),
    "two columns": (lambda t: t[jnp.array([1, 1, 4]), jnp.array([2, 2, -1])], True),
    "more than there are": (lambda t: t[jnp.arange(12) % 11], False),
    "elements": (lambda t: t[jnp.array([1, 1]), jnp.array([2, 2]), 0], False),
    "parts of rows": (
        lambda t: jax.vmap(lambda i: lax.dynamic_slice_in_dim(t, i, 2))(IDS[0]), False
    ),
    "batched": (lambda t: jax.vmap(lambda t, i: t[i])(t, jnp.arange(11) % 5), False),
}


@pytest.mark.parametrize(("read", "stays"), READS.values(), ids=READS)
def test_rows_are_merged(read, stays, x64):
    table = jax.random.normal(jax.random.key(1), (11, 5, 2))
    fun = lambda t: jnp.sum(jnp.sin(read(t)) ** 2)

    @jax.jit
    def both(table):
        rows = fbprop.grad(fun, factored=True)(table)
        assert isinstance(rows, fbprop.Rows)
        merged = rows.merged()
        assert isinstance(merged, fbprop.Rows) == stays
        squares = merged.map(jnp.square).dense() if stays else merged**2  # of what met
        return merged.dense() if stays else merged, squares, jax.grad(fun)(table)

    dense, squares, expected = both(table)
    chex.assert_trees_all_close(dense, expected, rtol=1e-12, atol=1e-14)
    chex.assert_trees_all_close(squares, expected**2, rtol=1e-12, atol=1e-14)


def test_a_step_makes_no_table_of_zeros():
    """Adam's step on a table of 2 MB needs less than that beside it, and learns the same."""
    params, optimizer = network(100_003), optim.adam(0.1)
    state = train.init(params, optimizer)
    ours = train.step(loss, optimizer)
    compiled = ours.lower(state, IDS).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["w"].nbytes / 4
    unlike = optim.Optimizer(optimizer.init, lambda *a, **k: optimizer.update(*a, **k))
    dense = train.step(loss, unlike)
    states = train.init(params, unlike)
    assert dense.lower(states, IDS).compile().memory_analysis().temp_size_in_bytes > (
        params["w"].nbytes
    )
    for _ in range(3):
        state, metrics = ours(state, IDS)
        states, expected = dense(states, IDS)
    chex.assert_trees_all_close(
        (state.params, state.opt_state, metrics), (states.params, states.opt_state, expected),
        rtol=1e-5, atol=1e-6,
    )


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"compute_dtype": jnp.bfloat16}])
def test_other_steps_have_arrays(options):
    params, optimizer = network(), optim.adam(0.1)
    state, _ = train.step(loss, optimizer, **options)(
        train.init(params, optimizer), IDS
    )
    plain = optim.Optimizer(optimizer.init, lambda *a, **k: optimizer.update(*a, **k))
    expected, _ = train.step(loss, plain, **options)(train.init(params, plain), IDS)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5, atol=1e-6)


def test_a_weighted_loss_too():
    def weighted(params, batch, key):
        return train.Weighted(loss(params, batch, key), jnp.float32(6))

    params, optimizer = network(), optim.adam(0.1)
    state, _ = train.step(weighted, optimizer)(train.init(params, optimizer), IDS)
    gradient = jax.tree.map(lambda g: g / 6, jax.grad(looked_up)(params))
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    chex.assert_trees_all_close(
        state.params, optim.apply_updates(params, updates), rtol=1e-5, atol=1e-6
    )
