"""Training by other learning rules: steps, epochs, frozen parameters, precision, checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import learning, optim, train

DRAW = np.random.default_rng(0)
X = jnp.asarray(DRAW.normal(size=(24, 3)), "float32")
DATA = {"x": X, "y": jnp.tanh(X @ jnp.ones((3, 2)))}
PARAMS = {"a": jnp.asarray(DRAW.normal(size=(3, 8)), "float32") / 2,
          "b": jnp.asarray(DRAW.normal(size=(8, 2)), "float32") / 2, "c": jnp.zeros(2)}
METHODS = {
    "kolen_pollack": learning.kolen_pollack(0.01),
    "by_path": learning.by_path({
        "b": learning.sign_symmetry("batch_random"), "a": learning.kolen_pollack(0.1),
        "*": learning.backprop(),
    }),
}


def loss(params, batch, key):
    h = jnp.tanh(batch["x"] @ params["a"])
    error = jnp.mean((h @ params["b"] + params["c"] - batch["y"]) ** 2)
    return error, {"size": jnp.mean(jnp.abs(h))}


def begun(method, optimizer, **options):
    key = jax.random.key(3)
    memory = method.init(jax.random.key(1), loss, PARAMS, DATA, key)
    return train.init(PARAMS, optimizer, key, learning=memory, **options)


def assert_equal(a, b):
    def one(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(one, a, b)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_direction_optimiser_and_update(name):
    method, optimizer = METHODS[name], optim.sgd(0.1, momentum=0.9)
    state = begun(method, optimizer)
    step = train.step(loss, optimizer, learning=method, alignment=True)
    params, opt_state, memory = jax.tree.map(jnp.copy, (PARAMS, state.opt_state, state.learning))

    @jax.jit
    def by_hand(params, opt_state, memory, key):
        run = method.value_and_grad(loss, has_aux=True)
        ((value, _), direction), memory = run(params, DATA, key, memory=memory)
        updates, opt_state = optimizer.update(direction, opt_state, params)
        updates, memory = method.update(updates, params, memory)
        return value, optim.apply_updates(params, updates), opt_state, memory

    for i in range(3):
        state, metrics = step(state, DATA)
        key = jax.random.fold_in(jax.random.key(3), i)
        value, params, opt_state, memory = by_hand(params, opt_state, memory, key)
        np.testing.assert_allclose(metrics["loss"], value, 1e-6)
        assert 0 < metrics["alignment"] < 1
    for a, b in zip(jax.tree.leaves((state.params, state.learning)),
                    jax.tree.leaves((params, memory))):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, 1e-5, 1e-6)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    method, optimizer = METHODS["by_path"], optim.adam(0.01)
    fit = functools.partial(
        train.fit, loss, optimizer, data=DATA, batch_size=8, progress=False, learning=method
    )
    whole = fit(begun(method, optimizer), epochs=4)
    fit(begun(method, optimizer), epochs=2, checkpoints=tmp_path)
    again = fit(begun(method, optimizer), epochs=4, checkpoints=tmp_path)
    assert int(again.state.step) == 12
    assert_equal(whole.state, again.state)


def test_pieces_frozen_parameters_and_float16():
    method = METHODS["by_path"]
    optimizer = optim.freeze(optim.sgd(0.1), "a")
    state = begun(method, optimizer, loss_scale=train.loss_scale(8.0))
    run = train.step(
        loss, optimizer, learning=method, accumulate=2, compute_dtype=jnp.float16
    )
    state, metrics = run(state, DATA)
    assert not metrics["skipped"]
    assert_equal(state.params["a"], PARAMS["a"])
    assert np.any(state.params["b"] != PARAMS["b"])
    before = jax.tree.map(jnp.copy, (state.params, state.learning))
    state, metrics = run(state, jax.tree.map(lambda x: x + jnp.inf, DATA))
    assert metrics["skipped"]
    assert_equal((state.params, state.learning), before)


def test_a_rule_and_its_memory_come_together():
    optimizer, method = optim.sgd(0.1), METHODS["kolen_pollack"]
    with pytest.raises(ValueError, match="got a state without a memory; expected train.init"):
        train.step(loss, optimizer, learning=method)(train.init(PARAMS, optimizer), DATA)
    with pytest.raises(ValueError, match="got a memory in the state alone"):
        train.step(loss, optimizer)(begun(method, optimizer), DATA)
    with pytest.raises(TypeError, match="learning.Method, got str"):
        train.step(loss, optimizer, learning="feedback")(begun(method, optimizer), DATA)
