"""The training step: same numbers as jax.grad, one compilation, donated buffers, any platform."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim, train

SIZES = (5, 7, 3)
OPTIMIZERS = {
    "sgd": optim.sgd(0.1),
    "momentum": optim.sgd(0.1, momentum=0.9),
    "adam": optim.adam(0.01),
}


def network(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [
        {"w": normal(rng, n, m, dtype=dtype) / 2, "b": jnp.zeros(m, dtype)}
        for n, m in itertools.pairwise(SIZES)
    ]


def normal(rng, *shape, dtype):
    return jax.device_put(rng.standard_normal(shape).astype(dtype))


def apply(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss(params, batch, key):
    x, y = batch
    error = apply(params, x) - y
    return jnp.mean(error * error)


def examples(n, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return normal(rng, n, SIZES[0], dtype=dtype), normal(rng, n, SIZES[-1], dtype=dtype)


def curve_by_jax(optimizer, params, batch, steps=10):
    state, losses = optimizer.init(params), []
    for _ in range(steps):
        value, grads = jax.jit(jax.value_and_grad(loss))(params, batch, None)
        updates, state = optimizer.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        losses.append(value)
    return losses


def curve_by_fbprop(optimizer, params, batch, steps=10):
    state, step = train.init(params, optimizer), train.step(loss, optimizer)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_curve_equals_that_of_jax_grad(name):
    arguments = OPTIMIZERS[name], network(), examples(11)
    np.testing.assert_allclose(curve_by_fbprop(*arguments), curve_by_jax(*arguments), rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_curve_equals_that_of_jax_grad_in_float64(name, x64):
    arguments = OPTIMIZERS[name], network(jnp.float64), examples(11, jnp.float64)
    np.testing.assert_allclose(curve_by_fbprop(*arguments), curve_by_jax(*arguments), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sixteen_bit_parameters_stay_so_and_learn(dtype):
    optimizer = optim.adam(optim.cosine(0.01, 2, 50))
    state = train.init(network(dtype), optimizer)
    step, batch, losses = train.step(loss, optimizer), examples(11, dtype), []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("params", [network(), 0.5, {"a": np.ones(3, np.float32), "b": 1.0}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_second_call_compiles_nothing(name, params, caplog):
    def squares(params, batch, key):
        return sum(jnp.sum(p * p) for p in jax.tree.leaves(params)) * batch

    optimizer = OPTIMIZERS[name]
    state, step = train.init(params, optimizer), train.step(squares, optimizer)
    epoch = train.epoch(squares, optimizer)
    for run, *arguments in [(step, jnp.float32(2)), (epoch, jnp.ones(4), jnp.arange(4))]:
        compiled = []
        for _ in range(3):
            caplog.clear()
            with jax.log_compiles():
                state, _ = run(state, *arguments)
            compiled.append(any("Compiling" in r.getMessage() for r in caplog.records))
        assert compiled == [True, False, False]


def test_old_state_is_donated_and_the_callers_arrays_are_not():
    params, key = network(), jax.random.key(3)
    optimizer = OPTIMIZERS["adam"]
    old = train.init(params, optimizer, key)
    batch = examples(11)
    new, _ = train.step(loss, optimizer)(old, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, key, batch, new)))
    train.epoch(loss, optimizer)(new, batch, jnp.zeros((1, 2), jnp.int32))
    assert all(x.is_deleted() for x in jax.tree.leaves(new))
    assert not any(x.is_deleted() for x in jax.tree.leaves(batch))


def test_donation_takes_the_memory_of_the_state():
    optimizer = OPTIMIZERS["adam"]
    state = train.init(network(), optimizer)
    compiled = train.step(loss, optimizer).lower(state, examples(11)).compile()
    arrays = jax.tree.leaves((state.params, state.opt_state))
    # Alignment may add to it.
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in arrays)


def noisy(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch[0].shape).astype(batch[0].dtype)
    return loss(params, (batch[0] * keep, batch[1]), key), {"kept": jnp.sum(keep)}


def test_epoch_is_the_repeated_step():
    optimizer = optim.adam(optim.linear(0.1, 0.0, 5))
    data, indices = examples(11), jnp.array([[0, 3], [10, 1], [2, 2], [7, 5], [4, 9]])
    one, many = (train.init(network(), optimizer, jax.random.key(5)) for _ in range(2))
    many, stacked = train.epoch(noisy, optimizer)(many, data, indices)
    step, single = train.step(noisy, optimizer), []
    for rows in indices:
        one, metrics = step(one, jax.tree.map(lambda x: x[rows], data))
        single.append(metrics)
    chex.assert_trees_all_close(stacked, jax.tree.map(lambda *m: jnp.stack(m), *single), rtol=1e-6)
    chex.assert_trees_all_close(one.params, many.params, rtol=1e-6, atol=1e-7)
    assert int(one.step) == int(many.step) == 5
    assert len(set(np.asarray(stacked["kept"]).tolist())) > 1, "every step has its own key"


def test_randomness_depends_on_key_and_step_only():
    optimizer, batch = optim.sgd(0.0), examples(11)
    step = train.step(noisy, optimizer)
    first, again, other = (
        step(train.init(network(), optimizer, jax.random.key(seed)), batch) for seed in (1, 1, 2)
    )
    assert first[1]["loss"] == again[1]["loss"]
    assert first[1]["loss"] != other[1]["loss"]
    assert step(first[0], batch)[1]["loss"] != again[1]["loss"]


def test_old_style_keys_work():
    optimizer = optim.sgd(0.1)
    state = train.init(network(), optimizer, jax.random.PRNGKey(0))
    state, metrics = train.step(noisy, optimizer)(state, examples(11))
    assert np.isfinite(metrics["loss"])


def test_data_batched_already():
    optimizer, (x, y) = optim.sgd(0.1), examples(12)
    run = train.epoch(loss, optimizer)
    by_row = run(train.init(network(), optimizer), (x, y), jnp.arange(12).reshape(4, 3))
    batched = (x.reshape(4, 3, -1), y.reshape(4, 3, -1))
    by_batch = run(train.init(network(), optimizer), batched, jnp.arange(4))
    chex.assert_trees_all_close(by_row[1], by_batch[1], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_and_epoch_lower_for_every_platform(name):
    optimizer, data = OPTIMIZERS[name], examples(11)
    state = train.init(network(), optimizer)
    for function, arguments in [
        (train.step(loss, optimizer), (state, data)),
        (train.epoch(noisy, optimizer), (state, data, jnp.zeros((2, 3), jnp.int32))),
        (train.evaluate(lambda p, b: loss(p, b, None), 2), (state.params, data)),
    ]:
        exported = jax.export.export(function, platforms=["cpu", "cuda", "tpu"])(*arguments)
        assert exported.platforms == ("cpu", "cuda", "tpu")


def test_overridden_rules_reach_the_step():
    import fbprop

    blocked = fbprop.table.override(fbprop.rule("tanh", "x̄ = 0", x=lambda dy: jnp.zeros_like(dy)))
    optimizer = optim.sgd(0.1)
    params = network()
    state, _ = train.step(loss, optimizer, rules=blocked)(
        train.init(params, optimizer), examples(11)
    )
    chex.assert_trees_all_equal(state.params[0], params[0])
    assert not np.array_equal(state.params[1]["w"], params[1]["w"])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 11, 20])
def test_evaluation_counts_every_example_once(batch_size):
    data = {"x": jnp.arange(11.0), "y": jnp.arange(11) % 3}

    def metric(p, batch):
        right = batch["y"] == 0
        return {"per example": right, "mean": jnp.mean(batch["x"]) * p, "square": batch["x"] ** 2}

    got = train.evaluate(metric, batch_size)(jnp.float32(2), data)
    expected = {"per example": 4 / 11, "mean": 10.0, "square": 35.0}
    chex.assert_trees_all_close(got, jax.tree.map(np.float32, expected), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 11, 20])
def test_prediction_keeps_the_order(batch_size):
    x, _ = examples(11)
    got = train.predict(lambda p, x: {"out": apply(p, x)}, batch_size)(network(), x)
    chex.assert_trees_all_close(got["out"], apply(network(), x), rtol=1e-6, atol=1e-6)


def test_frozen_parameters_are_not_differentiated():
    seen = []

    @functools.partial(jax.custom_vjp)
    def watched(w):
        return w

    watched.defvjp(lambda w: (w, None), lambda _, dw: (seen.append("backward") or dw,))

    def of_watched(params, batch, key):
        first = {"w": watched(params[0]["w"]), "b": params[0]["b"]}
        return loss([first, *params[1:]], batch, key)

    params, batch = network(), examples(11)
    everything = optim.adam(0.01)
    train.step(of_watched, everything)(train.init(params, everything), batch)
    assert seen == ["backward"]
    for optimizer in (
        optim.freeze(everything, "0/*"),
        optim.chain(optim.clip_by_global_norm(1.0), optim.freeze(everything, "0/*")),
        optim.by_path({"0/*": None, "*": everything}),
        optim.freeze(optim.freeze(everything, "0/w"), "0/b"),
    ):
        state, _ = train.step(of_watched, optimizer)(train.init(params, optimizer), batch)
        chex.assert_trees_all_equal(state.params[0], params[0])
        assert not np.array_equal(state.params[1]["w"], params[1]["w"])
        assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * 2, "no moments of frozen ones"
    assert seen == ["backward"]


def test_freezing_equals_zero_updates_of_a_plain_loop():
    optimizer, params, batch = optim.freeze(optim.adam(0.01), "*/b"), network(), examples(11)
    got = curve_by_fbprop(optimizer, params, batch)
    np.testing.assert_allclose(got, curve_by_jax(optimizer, params, batch), rtol=1e-6)


ERRORS = {
    "optimiser": (TypeError, r"pair \(init, update\), got float", lambda: train.step(loss, 0.1)),
    "initialise": (
        TypeError, r"pair \(init, update\), got type", lambda: train.init(network(), dict)
    ),
    "three results": (
        TypeError, r"scalar or \(scalar, dict of metrics\), got \(int, int, int\)",
        lambda: run_with(lambda p, b, k: (1, 2, 3)),
    ),
    "metrics not a dict": (
        TypeError, r"got \(int, list\)", lambda: run_with(lambda p, b, k: (1, [2])),
    ),
    "metric named loss": (
        ValueError, "expected another name",
        lambda: run_with(lambda p, b, k: (jnp.sum(p), {"loss": 1.0})),
    ),
    "float indices": (
        ValueError, r"integers \[steps, batch\], got float32\[2,3\]",
        lambda: run_epoch(jnp.ones(4), jnp.ones((2, 3))),
    ),
    "one index": (
        ValueError, r"integers \[steps, batch\], got int32\[\]",
        lambda: run_epoch(jnp.ones(4), jnp.int32(0)),
    ),
    "data of two lengths": (
        ValueError, r"got lengths \[2, 4\] expected one length",
        lambda: run_epoch([jnp.ones(4), jnp.ones(2)], jnp.zeros((1, 1), jnp.int32)),
    ),
    "data without examples": (
        ValueError, r"got float32\[\] as data expected an array",
        lambda: run_epoch(1.0, jnp.zeros((1, 1), jnp.int32)),
    ),
    "empty batch": (ValueError, "got batch_size=0", lambda: train.evaluate(loss, 0)),
    "no data": (
        ValueError, r"got lengths \[0\]",
        lambda: train.evaluate(lambda p, b: jnp.sum(b))(1.0, jnp.ones((0, 3))),
    ),
    "metric with axes": (
        ValueError, r"got shape \(4, 3\) expected \(\) or \(4,\)",
        lambda: train.evaluate(lambda p, b: b)(1.0, jnp.ones((4, 3))),
    ),
}


def run_with(function):
    optimizer = optim.sgd(0.1)
    return train.step(function, optimizer)(train.init(jnp.ones(3), optimizer), jnp.ones(3))


def run_epoch(data, indices):
    optimizer = optim.sgd(0.1)
    run = train.epoch(lambda p, b, k: jnp.sum(p), optimizer)
    return run(train.init(jnp.ones(3), optimizer), data, indices)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_expected(name):
    error, text, call = ERRORS[name]
    with pytest.raises(error, match=text):
        call()
