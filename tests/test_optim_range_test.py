"""The learning-rate range test: what it suggests, and how it reports divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim


def quadratic(params, batch, key):
    """Diverges for rates above 1, the reciprocal of half its curvature."""
    return jnp.mean((params["w"] - batch) ** 2), {"metric": jnp.float32(0)}


def find(loss=quadratic, **arguments):
    params = {"w": jnp.full(3, 5.0)}
    found = optim.find_learning_rate(loss, params, jnp.zeros((7, 3)), **arguments)
    assert not params["w"].is_deleted()
    return found


def test_quadratic_has_a_stable_rate_and_diverges_above():
    found = find(highest=1e4, optimizer=lambda rate: optim.chain(optim.scale(3.0), optim.sgd(rate)))
    # The gradient is 2 w / 3, tripled: stable below a rate of 1.
    assert 1e-2 < found.suggestion < 1
    assert 1 < found.diverged < 100
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 100
    assert np.all(np.isfinite(found.losses))
    assert found.rates[-1] < found.diverged
    np.testing.assert_allclose(found.losses[0], 25.0, rtol=1e-6)


def test_rates_are_those_the_optimiser_used():
    found = find(
        lambda params, batch, key: jnp.sum(params["w"]), lowest=0.1, highest=10.0, steps=5
    )
    np.testing.assert_allclose(found.rates, 0.1 * 10 ** (np.arange(5) / 2), rtol=1e-12)
    np.testing.assert_allclose(-np.diff(found.losses), 3 * found.rates[:-1], rtol=1e-5)
    assert found.diverged is None


def test_a_loss_that_is_nan_at_once_is_a_divergence():
    found = find(lambda params, batch, key: jnp.sum(params["w"]) * jnp.nan)
    assert found.diverged == pytest.approx(1e-6)
    assert found.suggestion is None
    assert found.rates.size == found.losses.size == found.smoothed.size == 0


def test_a_loss_that_never_falls_has_no_suggestion():
    found = find(lambda params, batch, key: 1.0 + 0.0 * jnp.sum(params["w"]))
    assert found.suggestion is None
    assert found.diverged is None
    assert found.rates.size == 100


def test_batches_and_noise_follow_the_key():
    def noisy(params, batch, key):
        return jnp.sum(params["w"]) * 0.0 + jax.random.normal(key) + jnp.mean(batch)

    first, again, other = (find(noisy, key=jax.random.key(k)).losses for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("arguments", [
    {"lowest": 0.0}, {"lowest": 1.0, "highest": 1.0}, {"steps": 2}
])
def test_errors_say_what_is_expected(arguments):
    with pytest.raises(ValueError, match="expected 0 < lowest < highest and steps >= 3"):
        find(**arguments)
