"""Handwritten digits learned under differential privacy: DP-SGD, with its accountant.

    python examples/privacy.py                # accuracy at epsilon 3 and 8, seeds 0 to 2
    python examples/privacy.py --epsilon 1

Every example's gradient is clipped to a norm of 1 and noise is added to the sum
(`fbprop.watch.per_example.clipped_sum`), so that no single image shows in the result: what it can
tell of one is bounded by (epsilon, delta), delta = 1e-4. Batches are drawn by Poisson sampling, as
the accountant assumes: every image by itself, with the same probability; those that are not drawn
count with a weight of 0.
"""

import argparse
import importlib.util
import math
import time

import jax
import jax.numpy as jnp

from fbprop import data, nn, optim
from fbprop.watch import per_example

DELTA = 1e-4
ORDERS = (*(1 + i / 10 for i in range(2, 100)), *range(11, 65), 80, 96, 128, 192, 256)


def log_add(a, b):
    """log(eᵃ + eᵇ)."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def log_moment(order, q, sigma):
    """log E (μ/μ₀)^order of the Gaussian of which one with probability q is shifted by 1.

    Mironov, Talwar and Zhang 2019 (arXiv:1908.10530), section 3.3; of orders between two whole
    ones by interpolation, as the logarithm is convex in the order.
    """
    low = math.floor(order)
    if order != low:
        share = order - low
        return (1 - share) * log_moment(low, q, sigma) + share * log_moment(low + 1, q, sigma)
    total = -math.inf
    for k in range(low + 1):
        term = math.log(math.comb(low, k)) + k * math.log(q) + (low - k) * math.log1p(-q)
        total = log_add(total, term + (k * k - k) / (2 * sigma**2))
    return total


def epsilon(q, sigma, steps, delta=DELTA, tight=True):
    """Of that many steps, by Rényi differential privacy of any order, the best.

    Args:
      q: probability with which a step draws an example; sigma: noise over clipping bound.
      tight: by Balle et al. 2020 (arXiv:1905.09982); else by Mironov 2017 (arXiv:1702.07476), as
        published tables have it.
    """
    def at(order):
        found = steps * log_moment(order, q, sigma) - math.log(delta)
        better = math.log1p(-1 / order) - math.log(order) / (order - 1) if tight else 0.0
        return found / (order - 1) + better

    return max(0.0, min(map(at, ORDERS)))


def noise_for(target, q, steps, delta=DELTA):
    """The smallest sigma whose epsilon is at most the target."""
    low, high = 0.3, 100.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon(q, middle, steps, delta) <= target else (middle, high)
    return high


network = nn.sequential(nn.conv(16, 3), nn.tanh(), nn.max_pool(2), nn.flatten(), nn.dense(10))


def loss(params, images, labels, weights):
    """Mean over the batch of cross-entropies, 0 for images that were not drawn."""
    logits = jax.nn.log_softmax(network.apply(params, images))
    picked = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return -jnp.mean(weights * picked)


def drawn(key, train_set, q):
    """A Poisson sample: images, labels, and weights that are 0 behind the last one drawn."""
    n = len(train_set["label"])
    room = min(n, math.ceil(n * q + 8 * math.sqrt(n * q)))  # exceeded once in 10¹⁵ steps
    chosen = jax.random.bernoulli(key, q, (n,))
    at = jnp.nonzero(chosen, size=room, fill_value=0)[0]
    weights = (jnp.arange(room) < jnp.sum(chosen)).astype(jnp.float32)
    return train_set["image"][at], train_set["label"][at], weights


def accuracy_of(seed, train_set, test_set, q, sigma, steps, rate):
    """Test accuracy after so many private steps, per tenth of them."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = network.init(init_key, train_set["image"])
    optimizer = optim.sgd(rate, momentum=0.9)
    private = per_example.clipped_sum(loss, 1.0, noise=sigma)

    def step(state, key):
        params, velocity = state
        draw_key, noise_key = jax.random.split(key)
        total = private(params, *drawn(draw_key, train_set, q), key=noise_key).gradient
        gradient = jax.tree.map(lambda g: g / (q * len(train_set["label"])), total)
        updates, velocity = optimizer.update(gradient, velocity, params)
        return (optim.apply_updates(params, updates), velocity), None

    def part(state, keys):
        state, _ = jax.lax.scan(step, state, keys)
        right = jnp.argmax(network.apply(state[0], test_set["image"]), -1) == test_set["label"]
        return state, jnp.mean(right)

    keys = jax.random.split(run_key, (10, steps // 10))
    return jax.lax.scan(part, (params, optimizer.init(params)), keys)[1]


def plot(curves, steps, file):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for name, runs in curves.items():
        for i, run in enumerate(runs):
            panel.plot([steps * (k + 1) / 10 for k in range(10)], run, label="" if i else name,
                       color=f"C{list(curves).index(name)}")
    panel.set(xlabel="step", ylabel="test accuracy")
    panel.legend()
    figure.savefig(file, dpi=120)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[3.0, 8.0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=256, help="on average")
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="ten steps, to see that it runs")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves (needs matplotlib)")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib, which is missing: pip install matplotlib")
    if options.smoke:
        options.steps, options.seeds = 10, 2
    return options


def main():
    options, start = parse_options(), time.perf_counter()
    train_set, test_set = jax.device_put(data.digits())
    q = options.batch_size / len(train_set["label"])
    run = jax.jit(
        lambda seed, sigma: accuracy_of(seed, train_set, test_set, q, sigma, options.steps,
                                        options.learning_rate)
    )
    curves = {}
    for target in options.epsilon:
        sigma = noise_for(target, q, options.steps)
        found = [run(seed, sigma) for seed in range(options.seeds)]
        curves[f"epsilon {target:g}"] = found
        last = sorted(float(accuracies[-1]) for accuracies in found)
        print(f"epsilon {epsilon(q, sigma, options.steps):.2f}, delta {DELTA:g}, noise {sigma:.2f}:"
              f" test accuracy {sum(last) / len(last):.3f}, {last[0]:.3f} to {last[-1]:.3f} over "
              f"{options.seeds} seeds ({time.perf_counter() - start:.0f} s)", flush=True)
    if options.plot:
        plot(curves, options.steps, options.plot)


if __name__ == "__main__":
    main()
