"""Schedules at their corner points."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim

ROOT = math.sqrt(0.5)
EXPECTED = {
    "constant": (optim.constant(0.3), {0: 0.3, 5: 0.3}),
    "linear": (optim.linear(1.0, 0.2, 4), {0: 1.0, 1: 0.8, 3: 0.4, 4: 0.2, 100: 0.2}),
    "exponential": (optim.exponential(2.0, 0.5, 2), {0: 2.0, 1: 2 * ROOT, 2: 1.0, 6: 0.25}),
    "exponential, stairs": (
        optim.exponential(2.0, 0.5, 2, staircase=True), {0: 2.0, 1: 2.0, 2: 1.0, 3: 1.0, 4: 0.5}
    ),
    "exponential, bounded below": (
        optim.exponential(2.0, 0.5, end_value=0.75), {0: 2.0, 1: 1.0, 2: 0.75, 9: 0.75}
    ),
    "exponential, bounded above": (
        optim.exponential(2.0, 2.0, end_value=5.0), {0: 2.0, 1: 4.0, 2: 5.0, 9: 5.0}
    ),
    "step": (optim.step(8.0, {2: 0.5, 5: 0.25}), {0: 8.0, 1: 8.0, 2: 4.0, 4: 4.0, 5: 1.0, 99: 1.0}),
    "cosine": (optim.cosine(1.0, 0, 4), {0: 1.0, 1: (1 + ROOT) / 2, 2: 0.5, 4: 0.0, 5: 0.0}),
    "cosine, warm-up, ends": (
        optim.cosine(1.0, 2, 6, end_value=0.2, init_value=0.4),
        {0: 0.4, 1: 0.7, 2: 1.0, 3: 0.6 + 0.4 * ROOT, 4: 0.6, 6: 0.2, 60: 0.2},
    ),
    "one cycle": (
        optim.one_cycle(1.0, 10, rise=0.4, div_factor=10.0, final_div_factor=10.0),
        {0: 0.1, 2: 0.55, 4: 1.0, 7: 0.505, 10: 0.01, 11: 0.01},
    ),
    "restarts, equal": (
        optim.warm_restarts(1.0, 2, end_value=0.2), {0: 1.0, 1: 0.6, 2: 1.0, 3: 0.6, 1000: 1.0}
    ),
    "restarts, doubling, falling": (
        optim.warm_restarts(1.0, 2, factor=2, peak_factor=0.5),
        {0: 1.0, 1: 0.5, 2: 0.5, 4: 0.25, 6: 0.25, 10: 0.125, 14: 0.125, 22: 0.0625},
    ),
    "restarts, tripling": (
        optim.warm_restarts(1.0, 3, factor=3), {3: 1.0, 12: 1.0, 39: 1.0, 120: 1.0, 363: 1.0}
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_corner_points(name):
    schedule, expected = EXPECTED[name]
    got = jax.jit(jax.vmap(schedule))(jnp.array(list(expected), jnp.int32))
    np.testing.assert_allclose(got, list(expected.values()), rtol=2e-6, atol=1e-7)
    eager = [schedule(t) for t in expected]
    np.testing.assert_allclose(eager, list(expected.values()), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", EXPECTED)
def test_corner_points_in_float64(name, x64):
    schedule, expected = EXPECTED[name]
    got = [schedule(jnp.int32(t)) for t in expected]
    assert {x.dtype for x in got} == {jnp.dtype(jnp.float64)}
    np.testing.assert_allclose(got, list(expected.values()), rtol=1e-12, atol=1e-15)


def test_restarts_never_miss_a_cycle():
    """Where a cycle begins, the value is the peak; one update before, it is near the end value."""
    schedule = jax.jit(jax.vmap(optim.warm_restarts(1.0, 7, factor=2)))
    starts = np.array([7 * (2**i - 1) for i in range(1, 14)])
    np.testing.assert_allclose(schedule(jnp.asarray(starts)), 1.0, rtol=1e-5)
    assert np.all(schedule(jnp.asarray(starts - 1)) < 0.06)


def test_an_optimiser_reads_the_schedule_at_the_number_of_updates_done():
    optimizer = optim.sgd(lambda count: 10.0 ** -count.astype(jnp.float32))
    state, seen = optimizer.init(jnp.zeros(())), []
    for _ in range(3):
        updates, state = optimizer.update(jnp.ones(()), state)
        seen.append(float(updates))
    np.testing.assert_allclose(seen, [-1.0, -0.1, -0.01], rtol=1e-6)


ERRORS = {
    "linear": (lambda: optim.linear(1.0, 0.0, 0), "got steps=0 expected an integer >= 1"),
    "half a step": (lambda: optim.linear(1.0, 0.0, 2.5), "got steps=2.5 expected an integer"),
    "exponential": (lambda: optim.exponential(1.0, 0.0), "got decay_rate=0.0"),
    "step": (lambda: optim.step(1.0, {0: 0.5}), "got step=0 expected an integer >= 1"),
    "warm-up": (lambda: optim.cosine(1.0, -1, 4), "got warmup_steps=-1"),
    "cosine": (lambda: optim.cosine(1.0, 4, 4), "expected total_steps > warmup_steps"),
    "cycle": (lambda: optim.one_cycle(1.0, 2), "peak is at step 0; expected it between 1 and"),
    "period": (lambda: optim.warm_restarts(1.0, 0), "got period=0"),
    "factor": (lambda: optim.warm_restarts(1.0, 2, 0.5), "got factor=0.5 expected a number >= 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_expected(name):
    call, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        call()
