"""The example of differential privacy, and its accountant's table."""

import math
import re

import pytest
from test_examples import example, smoke


@pytest.mark.parametrize(("sigma", "epochs", "published"), [
    (1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10),
])
def test_epsilons_are_the_published_ones(sigma, epochs, published):
    """The table of TensorFlow Privacy's MNIST tutorial: batches of 256 of 60,000, delta 1e-5."""
    epsilon = example("privacy.py").epsilon
    steps = epochs * 60000 // 256
    assert epsilon(256 / 60000, sigma, steps, 1e-5, tight=False) == pytest.approx(published, 0.01)
    assert epsilon(256 / 60000, sigma, steps, 1e-5) < published


def test_moments_are_those_of_the_gaussian_mixture():
    """By integrating ((1 − q) + q e^((2x − 1) / 2σ²))^α over a Gaussian."""
    q, sigma, order = 0.2, 1.5, 5
    points = [i / 1000 for i in range(-30_000, 40_000)]
    weight = 1 / (1000 * sigma * math.sqrt(2 * math.pi))
    total = sum(
        math.exp(-x * x / (2 * sigma**2)) * weight
        * (1 - q + q * math.exp((2 * x - 1) / (2 * sigma**2))) ** order for x in points
    )
    assert example("privacy.py").log_moment(order, q, sigma) == pytest.approx(math.log(total))


def test_noise_is_the_least_that_is_enough():
    module = example("privacy.py")
    sigma = module.noise_for(3.0, 0.1, 50)
    assert module.epsilon(0.1, sigma, 50) <= 3 < module.epsilon(0.1, sigma - 1e-3, 50)


def test_privacy_smoke():
    rows = re.findall(r"^epsilon ([\d.]+), delta 0.0001, noise ([\d.]+): test accuracy ([\d.]+), "
                      r"([\d.]+) to ([\d.]+) over 2 seeds", smoke("privacy.py"), re.M)
    assert [float(row[0]) for row in rows] == pytest.approx([3, 8], abs=0.01)
    assert float(rows[0][1]) > float(rows[1][1])
    assert all(float(low) <= float(mean) <= float(high) for *_, mean, low, high in rows)
    assert float(rows[1][2]) > 0.2  # a tenth is chance
