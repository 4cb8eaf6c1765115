"""Mixed precision: 16-bit arithmetic, float32 parameters, and a loss scale that finds its place."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim, train

SIXTEEN = [jnp.bfloat16, jnp.float16]


def loss(params, batch, key):
    x, y = batch
    for w in params:
        x = jnp.tanh(x @ w)
    error = (x - y).astype(jnp.float32)
    return jnp.mean(error * error), {"dtype is 16 bits": jnp.int32(x.dtype.itemsize == 2)}


def network():
    keys = jax.random.split(jax.random.key(0), 2)
    return [jax.random.normal(k, (5, 5)) * 0.5 for k in keys]


def examples():
    return jax.random.normal(jax.random.key(1), (11, 5)), jnp.full((11, 5), 0.5)


def scale_for(dtype):
    return train.loss_scale() if dtype == jnp.float16 else None


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_computes_in_sixteen_bits_and_learns_as_float32_does(dtype):
    optimizer = optim.adam(0.01)

    def curve(dtype, scale):
        state, losses = train.init(network(), optimizer, loss_scale=scale), []
        step = train.step(loss, optimizer, compute_dtype=dtype)
        for _ in range(50):
            state, metrics = step(state, examples())
            losses.append(float(metrics["loss"]))
        return state, metrics, losses

    _, metrics, expected = curve(None, None)
    assert int(metrics["dtype is 16 bits"]) == 0
    state, metrics, losses = curve(dtype, scale_for(dtype))
    assert int(metrics["dtype is 16 bits"]) == 1
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(losses, expected, rtol=0.1)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_scale_does_not_change_float32_steps(pieces):
    optimizer, results = optim.sgd(0.5), []
    batch = jax.tree.map(lambda x: x[:10], examples())
    for scale in (None, train.loss_scale(2.0**10)):
        step = train.step(loss, optimizer, accumulate=pieces)
        state, metrics = step(train.init(network(), optimizer, loss_scale=scale), batch)
        results.append((state.params, metrics["loss"]))
    # A power of two changes no bit of a mantissa; the division by the weight comes after.
    chex.assert_trees_all_close(*results, rtol=1e-7)


def test_small_gradients_survive_only_when_scaled():
    # The cotangent inside, 1e-9, is less than float16's least number, 6e-8.
    def tiny(params, batch, key):
        return jnp.sum((params * batch).astype(jnp.float32)) * 1e-9

    def moved(scale):
        optimizer = optim.sgd(1e9)
        step = train.step(tiny, optimizer, compute_dtype=jnp.float16)
        state = train.init(jnp.zeros(3), optimizer, loss_scale=train.loss_scale(scale))
        return step(state, jnp.ones(3))[0].params

    np.testing.assert_array_equal(moved(1.0), np.zeros(3))
    np.testing.assert_allclose(moved(2.0**15), -np.ones(3), rtol=4e-3)


def steep(params, batch, key):
    """A gradient of 8 in float16: times a scale above 4,096 more than float16's largest number."""
    return jnp.sum((params * batch).astype(jnp.float32))


def test_overflow_skips_the_step_and_halves_the_scale():
    optimizer = optim.adam(0.1)
    step = train.step(steep, optimizer, compute_dtype=jnp.float16)
    state = train.init(jnp.ones(3), optimizer, loss_scale=train.loss_scale(2.0**15))
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    scales, skipped = [], []
    for _ in range(5):
        state, metrics = step(state, jnp.full(3, 8.0))
        if not skipped:
            chex.assert_trees_all_equal((state.params, state.opt_state), before)
        scales.append(float(metrics["loss_scale"]))
        skipped.append(bool(metrics["skipped"]))
    assert scales == [2.0**15, 2.0**14, 2.0**13, 2.0**12, 2.0**12]
    assert skipped == [True, True, True, False, False]
    assert int(state.step) == 5
    assert int(state.opt_state[0].count) == 2
    assert not np.array_equal(state.params, before[0])


def test_the_scale_grows_after_an_interval_and_never_below_one():
    optimizer = optim.sgd(0.0)
    step = train.step(steep, optimizer, compute_dtype=jnp.float16)
    state, scales = train.init(jnp.ones(3), optimizer, loss_scale=train.loss_scale(4.0, 2)), []
    for _ in range(5):
        state, metrics = step(state, jnp.ones(3))
        scales.append(float(metrics["loss_scale"]))
    assert scales == [4, 4, 8, 8, 16]
    for _ in range(7):
        state, metrics = step(state, jnp.full(3, jnp.inf))
        assert bool(metrics["skipped"])
    assert float(state.loss_scale.scale) == 1


def test_the_scale_has_an_upper_bound_and_comes_back():
    """Gradients stay right at the bound, whatever divides them; an overflow halves it again."""
    optimizer = optim.sgd(1.0)

    def weighted(params, batch, key):
        total = jnp.sum(params * batch) * 1e-20
        return train.Weighted(total, jnp.float32(3))

    step = train.step(weighted, optimizer, accumulate=2)
    scale = train.loss_scale(2.0**60, 1)
    state, scales = train.init(jnp.zeros(2), optimizer, loss_scale=scale), []
    for _ in range(8):
        before = np.asarray(state.params)
        state, metrics = step(state, jnp.ones((2, 2)))
        scales.append(float(metrics["loss_scale"]))
        np.testing.assert_allclose(state.params - before, -2e-20 / 6 * np.ones(2), rtol=1e-5)
    assert scales == [2.0 ** min(n, 64) for n in range(60, 68)]
    for found, then in [(2.0**64, 2.0**63), (np.inf, 2.0**64)]:
        fresh = train.loss_scale(interval=1)._replace(scale=jnp.float32(found))
        state = state._replace(loss_scale=fresh)
        state, metrics = step(state, jnp.full((2, 2), jnp.inf))
        assert bool(metrics["skipped"])
        assert float(state.loss_scale.scale) == then
    assert bool(jnp.isfinite(state.params).all())
    state, metrics = step(state, jnp.ones((2, 2)))
    assert not bool(metrics["skipped"])


def test_a_skipped_step_leaves_the_model_state():
    def stateful(params, batch, key, model_state):
        return steep(params, batch, key), {}, model_state + 1

    optimizer = optim.sgd(0.0)
    step = train.step(stateful, optimizer, compute_dtype=jnp.float16)
    state = train.init(
        jnp.ones(3), optimizer, model_state=jnp.int32(0), loss_scale=train.loss_scale(2.0**13)
    )
    seen = []
    for _ in range(3):
        state, _ = step(state, jnp.full(3, 8.0))
        seen.append(int(state.model_state))
    assert seen == [0, 1, 2]


def test_scaled_steps_compile_once_and_export(caplog):
    optimizer = optim.adam(0.1)
    step = train.step(loss, optimizer, compute_dtype=jnp.float16, accumulate=11)
    state = train.init(network(), optimizer, loss_scale=train.loss_scale())
    exported = jax.export.export(step, platforms=["cpu", "cuda", "tpu"])(state, examples())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    compiled = []
    for _ in range(3):
        caplog.clear()
        with jax.log_compiles():
            state, _ = step(state, examples())
        compiled.append(any("Compiling" in r.getMessage() for r in caplog.records))
    assert compiled == [True, False, False]


ERRORS = {
    "unscaled float16": (
        r"loss_scale=None; expected train\.init", lambda: one_step(compute_dtype=jnp.float16)
    ),
    "integers": ("got compute_dtype=int8", lambda: one_step(compute_dtype=jnp.int8)),
    "odd scale": ("got initial=3 expected 1, 2, 4", lambda: train.loss_scale(3)),
    "no scale": ("got initial=0.5", lambda: train.loss_scale(0.5)),
    "infinite scale": ("got initial=inf", lambda: train.loss_scale(float("inf"))),
    "too large a scale": ("expected 1, 2, 4, .* up to", lambda: train.loss_scale(2.0**65)),
    "half an interval": ("got interval=2.5", lambda: train.loss_scale(interval=2.5)),
    "long interval": ("got interval=2147483648", lambda: train.loss_scale(interval=2**31)),
    "no interval": ("got interval=0", lambda: train.loss_scale(interval=0)),
}


def one_step(**options):
    optimizer = optim.sgd(0.1)
    return train.step(loss, optimizer, **options)(train.init(network(), optimizer), examples())


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_expected(name):
    text, call = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        call()
