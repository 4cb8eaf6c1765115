"""Gradient accumulation equals the whole batch; token-weighted losses; model state; metrics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim, train

N = 12


def params(dtype=jnp.float32):
    w = jax.random.normal(jax.random.key(0), (5, 3), dtype)
    return {"w": w, "b": jnp.zeros(3, dtype)}


def batch(dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(1), (N, 7, 5), dtype)
    lengths = jnp.array([7, 1, 2, 0, 5, 3, 7, 1, 0, 0, 2, 4])
    return {"x": x, "real": jnp.arange(7) < lengths[:, None]}


def losses(params, batch):
    return jnp.sum(jnp.tanh(batch["x"] @ params["w"] + params["b"]) ** 2, axis=-1)


def mean_loss(params, batch, key):
    each = losses(params, batch)
    return jnp.mean(each), {"largest": jnp.mean(jnp.max(each, axis=-1)), "n": jnp.int32(3)}


def token_loss(params, batch, key):
    total = jnp.sum(losses(params, batch), where=batch["real"])
    tokens = jnp.sum(batch["real"])
    long = train.Weighted(jnp.sum(batch["real"][:, 3:]), tokens)
    return train.Weighted(total, tokens), {"long": long}


@pytest.mark.parametrize("loss", [mean_loss, token_loss])
@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_accumulation_equals_the_whole_batch(loss, pieces, x64):
    def ten_steps(pieces):
        optimizer = optim.chain(optim.clip_by_global_norm(0.1), optim.adam(0.01))
        state = train.init(params(jnp.float64), optimizer)
        step, curve = train.step(loss, optimizer, accumulate=pieces), []
        for _ in range(10):
            state, metrics = step(state, batch(jnp.float64))
            curve.append(metrics)
        return state.params, jax.tree.map(lambda x: jnp.asarray(x, float), curve)

    chex.assert_trees_all_close(ten_steps(pieces), ten_steps(1), rtol=1e-11)


def test_the_weighted_gradient_is_that_of_the_mean_over_tokens():
    def mean(params):
        each, real = losses(params, batch()), batch()["real"]
        return jnp.sum(each, where=real) / jnp.sum(real).astype(jnp.float32)

    optimizer = optim.sgd(1.0)
    state, metrics = train.step(token_loss, optimizer)(train.init(params(), optimizer), batch())
    value, grads = jax.jit(jax.value_and_grad(mean))(params())
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    moved = jax.tree.map(lambda old, new: old - new, params(), state.params)
    chex.assert_trees_all_close(moved, grads, rtol=1e-5, atol=1e-6)
    assert float(metrics["long"]) == float(jnp.sum(batch()["real"][:, 3:])) / 32


def test_a_batch_without_tokens_changes_nothing():
    optimizer = optim.sgd(1.0)
    empty = batch() | {"real": jnp.zeros((N, 7), bool)}
    for pieces in (1, 3):
        step = train.step(token_loss, optimizer, accumulate=pieces)
        state, metrics = step(train.init(params(), optimizer), empty)
        assert float(metrics["loss"]) == 0
        chex.assert_trees_all_equal(state.params, params())


def test_accumulation_takes_less_memory():
    def deep(params, x, key):
        for _ in range(8):
            x = jnp.tanh(x @ params)
        return jnp.mean(x)

    def temporary(pieces):
        optimizer = optim.sgd(0.1)
        state, x = train.init(jnp.eye(16), optimizer), jnp.ones((4096, 16))
        step = train.step(deep, optimizer, accumulate=pieces)
        return step.lower(state, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.3 * temporary(1)


def test_sixteen_bit_parameters_accumulate_in_float32():
    # 1 + 2⁻⁹ is 1 in bfloat16: 255 such terms added one by one would stay at 1.
    x = jnp.full((256, 1), 2.0**-9, jnp.bfloat16).at[0].set(1.0)
    optimizer = optim.sgd(1.0)
    step = train.step(lambda p, b, k: jnp.sum(p * b) * 256, optimizer, accumulate=256)
    state, _ = step(train.init(jnp.zeros(1, jnp.bfloat16), optimizer), x)
    assert float(state.params[0]) == -1.5


def test_every_piece_has_its_own_key():
    def loss(params, batch, key):
        return jnp.sum(params * batch), {"drawn": jax.random.uniform(key)}

    optimizer = optim.sgd(0.0)
    step = train.step(loss, optimizer, accumulate=2)
    _, metrics = step(train.init(jnp.ones(1), optimizer, jax.random.key(4)), jnp.ones((2, 1)))
    of_step = jax.random.fold_in(jax.random.key(4), 0)
    drawn = [jax.random.uniform(jax.random.fold_in(of_step, i)) for i in range(2)]
    np.testing.assert_allclose(metrics["drawn"], np.mean(drawn), rtol=1e-6)


def running(params, batch, key, model_state):
    mean = 0.5 * model_state["mean"] + 0.5 * jnp.mean(batch)
    value = jnp.mean((batch * params - model_state["mean"]) ** 2)
    return value, {"seen": mean}, {"mean": mean, "count": model_state["count"] + 1}


def test_model_state_goes_from_step_to_step_and_piece_to_piece():
    optimizer, x = optim.sgd(0.0), jnp.arange(4.0)
    start = {"mean": jnp.zeros(()), "count": 0}

    def fresh():
        return train.init(jnp.ones(()), optimizer, model_state=start)

    step = train.step(running, optimizer)
    state, _ = step(fresh(), x)
    state, metrics = step(state, x)
    assert jax.tree.map(float, state.model_state) == {"mean": 1.125, "count": 2.0}
    assert float(metrics["seen"]) == 1.125
    pieces, _ = train.step(running, optimizer, accumulate=2)(fresh(), x)
    assert float(pieces.model_state["mean"]) == 0.5 * 0.25 + 0.5 * 2.5
    many, _ = train.epoch(running, optimizer)(fresh(), x, jnp.tile(jnp.arange(4), (2, 1)))
    chex.assert_trees_all_equal(many.model_state, state.model_state)


def test_model_state_is_donated_and_keeps_its_dtype():
    optimizer = optim.sgd(0.1)
    old = train.init(jnp.ones(()), optimizer, model_state={"mean": jnp.zeros(()), "count": 0})
    step = train.step(running, optimizer, compute_dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        new, _ = step(old, jnp.arange(4.0))
    assert old.model_state["mean"].is_deleted()
    assert new.model_state["mean"].dtype == jnp.float32
    assert new.model_state["count"].dtype == jnp.int32


def test_the_range_test_takes_every_kind_of_loss():
    def weighted(params, batch, key):
        return train.Weighted(jnp.sum((params - batch) ** 2), batch.size)

    def stateful(params, batch, key, model_state):
        return jnp.mean((params - batch) ** 2), {}, model_state + 1

    def plain(params, batch, key):
        return jnp.mean((params - batch) ** 2)

    expected = optim.find_learning_rate(plain, jnp.array(5.0), jnp.zeros(8))
    got = optim.find_learning_rate(weighted, jnp.array(5.0), jnp.zeros(8))
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-6)
    got = optim.find_learning_rate(
        stateful, jnp.array(5.0), jnp.zeros(8), model_state=jnp.int32(0)
    )
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 4, 5, 12, 99])
def test_evaluation_weighs_tokens(size):
    data = batch()

    def metric(params, batch):
        return token_loss(params, batch, None)[0]

    got = train.evaluate(metric, size)(params(), data)
    expected = jnp.sum(losses(params(), data), where=data["real"]) / 32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    parts = [jax.tree.map(lambda x: x[i:i + size], data) for i in range(0, N, size)]
    np.testing.assert_allclose(
        train.evaluate_batches(metric)(params(), parts), expected, rtol=1e-6
    )


def test_evaluation_passes_a_model_state_on():
    def metric(params, batch, model_state):
        return {"shifted": batch + model_state}

    got = train.evaluate(metric, 2)(None, jnp.arange(3.0), jnp.float32(10))
    assert float(got["shifted"]) == 11
    got = train.evaluate_batches(metric)(None, [jnp.arange(3.0)], jnp.float32(10))
    assert float(got["shifted"]) == 11


ERRORS = {
    "indivisible": (
        ValueError, r"first axes of \[12\] expected one length, a multiple of accumulate=5",
        lambda: once(mean_loss, accumulate=5),
    ),
    "no pieces": (
        ValueError, "got accumulate=0 expected an integer >= 1", lambda: once(mean_loss, 0)
    ),
    "no model state returned": (
        TypeError, r"\(scalar, dict of metrics, model state\), as the state has one, got \(.*dict",
        lambda: once(lambda p, b, k, s: mean_loss(p, b, k), model_state=jnp.ones(2)),
    ),
    "another form of model state": (
        ValueError, r"keeps its form .* with shapes \[\(1,\)\] expected .* shapes \[\(2,\)\]",
        lambda: once(lambda p, b, k, s: (jnp.sum(p["w"]), {}, s[:1]), model_state=jnp.ones(2)),
    ),
    "no batches": (
        ValueError, "got no batches", lambda: train.evaluate_batches(lambda p, b: b)(None, [])
    ),
}


def once(loss, accumulate=1, model_state=None):
    optimizer = optim.sgd(0.1)
    step = train.step(loss, optimizer, accumulate=accumulate)
    return step(train.init(params(), optimizer, model_state=model_state), batch())


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_expected(name):
    error, text, call = ERRORS[name]
    with pytest.raises(error, match=text):
        call()
