"""Optimisers and schedules against Optax's, on the same gradients; either in the other's loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from fbprop import optim, train

RATE = 0.01
SHAPES = {"w": (3, 5), "b": (5,), "scale": ()}


def decays(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


PAIRS = {
    "sgd": (optim.sgd(RATE), optax.sgd(RATE)),
    "momentum": (optim.sgd(RATE, momentum=0.9), optax.sgd(RATE, momentum=0.9)),
    "nesterov": (
        optim.sgd(RATE, momentum=0.9, nesterov=True), optax.sgd(RATE, momentum=0.9, nesterov=True)
    ),
    "L2": (
        optim.sgd(RATE, momentum=0.9, weight_decay=0.1, mask=decays),
        optax.chain(optax.add_decayed_weights(0.1, decays), optax.sgd(RATE, momentum=0.9)),
    ),
    "adam": (optim.adam(RATE), optax.adam(RATE)),
    "adam, eps_root": (
        optim.adam(RATE, 0.8, 0.9, 1e-4, eps_root=1e-3), optax.adam(RATE, 0.8, 0.9, 1e-4, 1e-3)
    ),
    "adamw": (optim.adamw(RATE), optax.adamw(RATE)),
    "adamw, masked": (
        optim.adamw(RATE, weight_decay=0.1, mask="w"),
        optax.adamw(RATE, weight_decay=0.1, mask=decays),
    ),
    "amsgrad": (optim.amsgrad(RATE, b2=0.9), optax.amsgrad(RATE, b2=0.9)),
    "nadam": (optim.nadam(RATE), optax.nadam(RATE)),
    "rmsprop": (optim.rmsprop(RATE), optax.rmsprop(RATE)),
    "rmsprop, eps outside": (
        optim.rmsprop(RATE, eps_in_sqrt=False), optax.rmsprop(RATE, eps_in_sqrt=False)
    ),
    "rmsprop, centred, momentum": (
        optim.rmsprop(RATE, eps=1e-3, centered=True, momentum=0.9, nesterov=True),
        optax.rmsprop(RATE, eps=1e-3, centered=True, momentum=0.9, nesterov=True),
    ),
    "adagrad": (optim.adagrad(RATE), optax.adagrad(RATE)),
    "lion": (optim.lion(RATE), optax.lion(RATE)),
    "lamb": (optim.lamb(RATE, weight_decay=0.1), optax.lamb(RATE, weight_decay=0.1)),
    "adafactor": (
        optim.adafactor(RATE, min_dim_size_to_factor=2),
        optax.adafactor(RATE, min_dim_size_to_factor=2),
    ),
    "adafactor, whole, decayed, averaged": (
        optim.adafactor(RATE, momentum=0.9, weight_decay=0.1, multiply_by_parameter_scale=False),
        optax.adafactor(
            RATE, momentum=0.9, weight_decay_rate=0.1 * RATE, multiply_by_parameter_scale=False
        ),
    ),
    "muon": (optim.muon(RATE, weight_decay=0.1), contrib.muon(RATE, weight_decay=0.1)),
    "muon, plain momentum": (
        optim.muon(RATE, nesterov=False, adam_learning_rate=0.0),
        contrib.muon(RATE, nesterov=False, adam_learning_rate=0.0),
    ),
    "global norm": (
        optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(RATE)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE)),
    ),
    "value": (
        optim.chain(optim.clip_by_value(0.5), optim.sgd(RATE)),
        optax.chain(optax.clip(0.5), optax.sgd(RATE)),
    ),
    "rms": (
        optim.chain(optim.clip_by_leaf_rms(0.5), optim.sgd(RATE)),
        optax.chain(optax.clip_by_block_rms(0.5), optax.sgd(RATE)),
    ),
    "scheduled": (
        optim.adam(optim.cosine(RATE, 3, 8)),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, RATE, 3, 8)),
    ),
    "groups": (
        optim.by_path({"w": optim.adam(RATE), "b": None, "*": optim.sgd(RATE)}),
        optax.multi_transform(
            {"adam": optax.adam(RATE), "none": optax.set_to_zero(), "sgd": optax.sgd(RATE)},
            {"w": "adam", "b": "none", "scale": "sgd"},
        ),
    ),
    "theirs in our chain": (
        optim.chain(optax.clip_by_global_norm(1.0), optim.adam(RATE)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE)),
    ),
    "ours in their chain": (
        optax.chain(optim.clip_by_global_norm(1.0), optim.adam(RATE)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE)),
    ),
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def ten_steps(optimizer):
    params = draw(0)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for seed in range(1, 11):
        updates, state = update(draw(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", PAIRS)
def test_ten_steps_equal_those_of_optax(name, x64):
    # Optax's own code promotes implicitly.
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (ten_steps(optimizer) for optimizer in PAIRS[name])
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=1e-9)


VALUES = np.random.default_rng(0).uniform(1, 1.3, 60) * np.linspace(1, 0.9, 60)
PLATEAUS = {
    "defaults": {},
    "patient": {"patience": 3, "factor": 0.5},
    "resting": {"patience": 2, "cooldown": 3, "min_scale": 0.05},
    "averaging": {"patience": 2, "accumulation_size": 4, "rtol": 0.0, "atol": 0.02},
}


@pytest.mark.parametrize("name", PLATEAUS)
def test_plateaus_equal_those_of_optax(name, x64):
    def scales(part):
        state, seen, update = part.init(jnp.zeros(())), [], jax.jit(part.update)
        for value in VALUES:
            updates, state = update(jnp.ones(()), state, value=value)
            seen.append(float(updates))
        return seen

    with jax.numpy_dtype_promotion("standard"):
        ours = scales(optim.reduce_on_plateau(**PLATEAUS[name]))
        theirs = scales(contrib.reduce_on_plateau(**PLATEAUS[name]))
    assert len(set(ours)) > 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


SCHEDULES = {
    "linear": (optim.linear(1.0, 0.1, 7), optax.linear_schedule(1.0, 0.1, 7)),
    "exponential": (
        optim.exponential(1.0, 0.5, 3, end_value=0.1),
        optax.exponential_decay(1.0, 3, 0.5, end_value=0.1),
    ),
    "stairs": (
        optim.exponential(1.0, 0.5, 3, staircase=True),
        optax.exponential_decay(1.0, 3, 0.5, staircase=True),
    ),
    "cosine": (
        optim.cosine(1.0, 3, 11, end_value=0.1, init_value=0.2),
        optax.warmup_cosine_decay_schedule(0.2, 1.0, 3, 11, 0.1),
    ),
    "one cycle": (optim.one_cycle(1.0, 17), optax.cosine_onecycle_schedule(17, 1.0)),
    "restarts": (
        optim.warm_restarts(1.0, 3, factor=2, end_value=0.1),
        optax.sgdr_schedule([
            {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "decay_steps": n,
             "end_value": 0.1} for n in (3, 6, 12, 24)
        ]),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_those_of_optax(name, x64):
    ours, theirs = SCHEDULES[name]
    steps = range(30)
    with jax.numpy_dtype_promotion("standard"):
        expected = [theirs(t) for t in steps]
    got = [ours(jnp.int32(t)) for t in steps]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("optimizer", [
    optax.adamw(RATE), optax.chain(optax.clip(1.0), optim.sgd(RATE)),
    optax.chain(optax.sgd(RATE), contrib.reduce_on_plateau(patience=2)),
    optax.MultiSteps(optax.adam(RATE), 2),
])
def test_optax_optimisers_train(optimizer):
    traces = []

    def loss(params, batch, key):
        traces.append(batch.shape)
        return jnp.mean((batch @ params["w"] + params["b"]) ** 2)

    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    state = train.init(params, optimizer)
    data = jax.random.normal(jax.random.key(0), (8, 3))
    with jax.numpy_dtype_promotion("standard"):
        step, epoch = train.step(loss, optimizer), train.epoch(loss, optimizer)
        state, first = step(state, data)
        state, metrics = epoch(state, data, jnp.arange(8).reshape(4, 2).repeat(10, 0))
        state, last = step(state, data)
    assert metrics["loss"].shape == (40,)
    assert last["loss"] < first["loss"]
    assert traces == [(8, 3), (2, 3)]


def curved(params, batch, key):
    x, y = batch
    error = jnp.tanh(x @ params["w"]) * params["s"] + params["b"] - y
    return jnp.mean(error**2)


LINE_SEARCHES = {
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
    "lbfgs": optim.chain(optim.scale(1.0), optax.lbfgs()),
}


def start_curved():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (3,)), "s": jnp.float32(0.5), "b": jnp.float32(0.3)}
    x = jax.random.normal(keys[1], (12, 3))
    return params, (x, jnp.sin(x[:, 0]))


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_line_searches_are_served_as_in_an_optax_loop(name):
    optimizer, (start, batch) = LINE_SEARCHES[name], start_curved()
    value_fn = lambda p: curved(p, batch, None)

    def optax_step(params, state):
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, value

    with jax.numpy_dtype_promotion("standard"):
        state, params, theirs = train.init(start, optimizer), start, optimizer.init(start)
        ours, optax_step = train.step(curved, optimizer), jax.jit(optax_step)
        for _ in range(4):
            state, metrics = ours(state, batch)
            params, theirs, value = optax_step(params, theirs)
            np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4)
    chex.assert_trees_all_close(state.params, params, rtol=1e-3, atol=1e-5)


def test_line_searches_go_with_frozen_parameters_groups_pieces_and_epochs():
    start, batch = start_curved()
    with jax.numpy_dtype_promotion("standard"):
        for optimizer, still in (
            (optim.freeze(optax.lbfgs(), "b"), "b"),
            (optim.by_path({"b": None, "w": optax.lbfgs(), "*": optim.sgd(0.1)}), "b"),
        ):
            state = train.init(start, optimizer)
            run = train.epoch(curved, optimizer, accumulate=2)
            state, metrics = run(state, batch, jnp.arange(12)[None].repeat(3, 0))
            assert metrics["loss"][-1] < metrics["loss"][0]
            assert state.params[still] == start[still]
            assert state.params["w"][0] != start["w"][0]
