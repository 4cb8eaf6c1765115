"""Schedules at their corner points."""

import math
from fractions import Fraction

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


LAST = 2**31 - 1
HALF = math.pi / 2


def ease(start, end, done):
    return start * math.sin(HALF * float(1 - done)) ** 2 + end * math.sin(HALF * float(done)) ** 2


def exact_restarts(t, period, factor, peak_factor=1.0):
    start, length, cycle = 0, period, 0
    if factor == 1:
        start, cycle = t // period * period, t // period
    else:
        while start + length <= t:
            start, length, cycle = start + length, length * factor, cycle + 1
    return ease(peak_factor**cycle, 0, (t - start) / length)


def within(t, start, end):
    return min(max(Fraction(t - start, end - start), Fraction(0)), Fraction(1))


# A schedule, the same in exact integers, and steps at which something begins or ends.
EXACT = {
    "linear": (
        optim.linear(1.0, 0.0, LAST), lambda t: float(1 - within(t, 0, LAST)), (LAST - 1000,)
    ),
    "linear, longer than any count": (
        optim.linear(1.0, 3.0, 2**40), lambda t: float(1 + 2 * within(t, 0, 2**40)), ()
    ),
    "stairs": (
        optim.exponential(1.0, 0.5, 2**24 // 3, staircase=True),
        lambda t: 0.5 ** (t // (2**24 // 3)), [2**24 // 3 * n for n in (1, 2, 3, 7, 100)],
    ),
    "exponential": (
        optim.exponential(1.0, 0.25, LAST), lambda t: 0.25 ** (t / LAST), (LAST // 2,)
    ),
    "step": (
        optim.step(1.0, {2**24 + 1: 0.5, LAST - 1: 0.5, 2**40: 0.5}),
        lambda t: 0.5 ** ((t > 2**24) + (t >= LAST - 1)), (2**24, 2**24 + 2),
    ),
    "cosine": (
        optim.cosine(1.0, 2**24 + 1, LAST),
        lambda t: t / (2**24 + 1) if t <= 2**24 else ease(1, 0, within(t, 2**24 + 1, LAST)),
        (2**24, LAST - 1000),
    ),
    "one cycle": (
        optim.one_cycle(1.0, 2**30),
        lambda t: ease(1 / 25, 1, Fraction(t, int(0.3 * 2**30))) if t < int(0.3 * 2**30)
        else ease(1, 1 / 25e4, within(t, int(0.3 * 2**30), 2**30)),
        (int(0.3 * 2**30), 2**30),
    ),
    "restarts, equal": (
        optim.warm_restarts(1.0, 1001), lambda t: exact_restarts(t, 1001, 1),
        [1001 * n for n in (1, 1000, 10**6, 2 * 10**6)],
    ),
    "restarts, equal, falling": (
        optim.warm_restarts(1.0, 10**7 + 1, peak_factor=0.99),
        lambda t: exact_restarts(t, 10**7 + 1, 1, 0.99), [(10**7 + 1) * n for n in (1, 2, 200)],
    ),
    "restarts, longer than any count": (
        optim.warm_restarts(1.0, 2**32), lambda t: exact_restarts(t, 2**32, 1), ()
    ),
    "restarts, doubling": (
        optim.warm_restarts(1.0, 7, factor=2), lambda t: exact_restarts(t, 7, 2),
        [7 * (2**n - 1) for n in range(1, 29)],
    ),
    "restarts, slowly growing": (
        optim.warm_restarts(1.0, 100, factor=1.5), lambda t: exact_restarts(t, 100, 1.5),
        [math.ceil(200 * (1.5**n - 1)) for n in range(1, 30)],
    ),
    "restarts, 1,000 of them": (
        optim.warm_restarts(1.0, 10, factor=1.01), lambda t: exact_restarts(t, 10, 1.01),
        [math.ceil(1000 * (1.01**n - 1)) for n in (1, 2, 100, 1000)],
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_no_step_is_rounded_to_another(name):
    schedule, exact, corners = EXACT[name]
    steps = {0, 1, 10**6, 2**24 + 1, LAST - 1, LAST}
    steps |= {t + d for t in corners for d in (-1, 0, 1) if 0 <= t + d <= LAST}
    steps = sorted(steps)
    expected = [exact(t) for t in steps]
    traced = jax.jit(schedule)
    for counts in (np.array(steps, np.int32), np.array(steps, np.uint32)):
        np.testing.assert_allclose(traced(jnp.asarray(counts)), expected, rtol=4e-6, atol=1e-12)
    for t, value in zip(steps[-3:], expected[-3:]):
        for count in (t, np.int64(t)):
            np.testing.assert_allclose(schedule(count), value, rtol=4e-6, atol=1e-12)


def test_small_and_wide_counts(x64):
    schedule = optim.cosine(1.0, 300, 2**33)
    np.testing.assert_allclose(schedule(np.uint8(200)), 2 / 3, rtol=1e-15)
    for t in (2**32 + 1, 2**33 - 1, 2**40):
        expected = ease(1, 0, within(t, 300, 2**33))
        np.testing.assert_allclose(schedule(jnp.int64(t)), expected, rtol=1e-14)
    restarts = optim.warm_restarts(1.0, 7, factor=2)
    at = 7 * (2**40 - 1)
    np.testing.assert_allclose([restarts(at), restarts(at - 1)], [1, 0], atol=1e-15)


def test_counts_stay_at_the_largest_integer():
    """Every count in a state does, and the step goes on as if no end were near."""
    for optimizer in (optim.adam(optim.linear(0.1, 0.2, 10)), optim.nadam(0.1), optim.lion(0.1),
                      optim.nadam(0.1, momentum_decay=4e-3), optim.adafactor(0.1),
                      optim.chain(optim.sgd(0.1), optim.average_params(0.9, warmup=True))):
        params = jnp.ones(2)
        late = jax.tree.map(
            lambda x: jnp.full_like(x, LAST) if x.dtype == jnp.int32 else x, optimizer.init(params)
        )
        updates, state = optimizer.update(params, late, params)
        assert bool(jnp.isfinite(updates).all())
        counts = [int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
        assert counts
        assert set(counts) == {LAST}


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
    "nearly equal cycles": (
        lambda: optim.warm_restarts(1.0, 1, 1 + 1e-9), "makes more than 100000 cycles"
    ),
    "nan": (lambda: optim.linear(float("nan"), 0.0, 5), "got init_value=nan expected a finite"),
    "falling peaks": (lambda: optim.warm_restarts(1.0, 5, peak_factor=-1.0), "peak_factor=-1.0"),
    "divided by 0": (lambda: optim.one_cycle(1.0, 9, div_factor=0.0), "got div_factor=0.0"),
    "count": (lambda: optim.linear(1.0, 0.0, 5)(2**31), "expected at most 2147483647"),
    "factor": (lambda: optim.warm_restarts(1.0, 2, 0.5), "got factor=0.5 expected a number >= 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_expected(name):
    call, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        call()


def test_a_rate_is_a_number():
    with pytest.raises(TypeError, match="peak is a number, got 'high' of type str"):
        optim.cosine("high", 1, 5)
    with pytest.raises(TypeError, match="steps is a number, got None"):
        optim.linear(1.0, 0.0, None)
