"""An autoencoder of handwritten digits: K-FAC and SOAP need a fraction of Adam's steps.

    python examples/autoencoder.py            # how many steps each takes to Adam's loss
    python examples/autoencoder.py --plot curves.png

Every batch is all 1,437 training images. Adam's learning rate is the best of six; it runs for all
steps, its rate falling to 0, as SOAP's does. K-FAC's curvature is the Gauss-Newton matrix, its
Kronecker factors from one more backward sweep (random signs).
"""

import argparse
import importlib.util
import time

import jax
import jax.numpy as jnp

import fbprop
from fbprop import data, nn, optim
from fbprop.watch import curvature

RATES = 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1

network = nn.sequential(
    nn.dense(100), nn.tanh(), nn.dense(50), nn.tanh(), nn.dense(12),
    nn.dense(50), nn.tanh(), nn.dense(100), nn.tanh(), nn.dense(64),
)


def squared_error(outputs, images):
    """Mean over images of half the squared distance."""
    return jnp.mean(jnp.sum((outputs - images) ** 2, -1)) / 2


def root(output, image, z):
    """The square root of `squared_error`'s Hessian, 1, times z."""
    return z


def loss(params, images):
    return squared_error(network.apply(params, images), images)


def by_gradient(kind, params, images, rate, steps):
    """Losses of all steps of Adam or SOAP; the rate falls to 0."""
    optimizer = kind(optim.cosine(rate, warmup_steps=0, total_steps=steps))

    def step(state, _):
        params, moments = state
        value, gradient = fbprop.value_and_grad(loss)(params, images)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optim.apply_updates(params, updates), moments), value

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]


def by_kfac(params, images, options, steps):
    """Losses of all steps."""
    factors = curvature.ggn(network.apply, squared_error, "kronecker", samples=1, root=root)
    optimizer = optim.kfac(
        options.learning_rate, factors(params, images, images, key=jax.random.key(0)),
        damping=options.damping, every=5, clip=options.clip,
    )

    def step(state, key):
        params, moments = state
        value, gradient = fbprop.value_and_grad(loss)(params, images)
        now = factors(params, images, images, key=key)
        updates, moments = optimizer.update(gradient, moments, params, factors=now)
        return (optim.apply_updates(params, updates), moments), value

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]


def plot(curves, file):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for name, values in curves.items():
        panel.plot(range(1, len(values) + 1), values, label=name)
    panel.set(xlabel="step", ylabel="training loss", yscale="log", xscale="log")
    panel.legend()
    figure.savefig(file, dpi=120)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=0.1, help="K-FAC's")
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--soap-rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves (needs matplotlib)")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib, which is missing: pip install matplotlib")
    options.steps = 12 if options.smoke else options.steps
    return options


def main():
    options = parse_options()
    images = data.digits()[0]["image"].reshape(-1, 64)
    params = network.init(jax.random.key(options.seed), images)
    rates = RATES[3:4] if options.smoke else RATES
    adam = jax.jit(lambda rate: by_gradient(optim.adam, params, images, rate, options.steps))
    runs = {rate: adam(rate) for rate in rates}
    rate = min(runs, key=lambda rate: float(runs[rate][-1]))
    curves = {f"Adam, rate {rate:g}": runs[rate]}
    target = float(runs[rate][-1])
    print(f"Adam, rate {rate:g}: loss {target:.4f} after {options.steps} steps")

    others = {
        "K-FAC": lambda: by_kfac(params, images, options, options.steps),
        "SOAP": lambda: by_gradient(
            optim.soap, params, images, options.soap_rate, options.steps),
    }
    if options.smoke:
        del others["SOAP"]  # Adam's function, and five seconds to compile
    for name, run in others.items():
        start = time.perf_counter()
        losses = curves[name] = jax.block_until_ready(jax.jit(run)())
        seconds = time.perf_counter() - start
        reached = jnp.flatnonzero(losses <= target)
        after = f"after {int(reached[0])} steps" if len(reached) else "not reached"
        print(f"{name}: that loss {after}; {float(losses[-1]):.4f} after {options.steps} "
              f"({seconds:.0f} s with compilation)")
    if options.plot:
        plot(curves, options.plot)


if __name__ == "__main__":
    main()
