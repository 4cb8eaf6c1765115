"""Every optimiser against its published formula, written out in NumPy float64: ten steps, 1e-12."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim

SHAPES = {"w": (3, 5), "b": (5,), "scale": ()}
RATE = 0.01


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def sgd(p, grads, momentum=0.0, nesterov=False, dampening=0.0, decay=0.0):
    m = None
    for g in grads:
        g = g + decay * p
        m = g if m is None else momentum * m + (1 - dampening) * g
        p = p - RATE * (g + momentum * m if nesterov else m)
    return p


def adam(p, grads, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, l2=0.0, decay=0.0, nesterov=False):
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        g = g + l2 * p
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        p = p - RATE * (m_hat / (np.sqrt(v_hat + eps_root) + eps) + decay * p)
    return p


def amsgrad(p, grads, correct_before_max, b1=0.9, b2=0.9, eps=1e-8):
    m = v = largest = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        c1, c2 = 1 - b1**t, 1 - b2**t
        largest = np.maximum(largest, v / c2 if correct_before_max else v)
        root = np.sqrt(largest if correct_before_max else largest / c2)
        p = p - RATE * (m / c1) / (root + eps)
    return p


def warmed_nadam(p, grads, b1=0.9, b2=0.999, eps=1e-8, psi=4e-3):
    m = v = np.zeros_like(p)
    product = 1.0
    for t, g in enumerate(grads, 1):
        now, after = (b1 * (1 - 0.5 * 0.96 ** (k * psi)) for k in (t, t + 1))
        product *= now
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat = after * m / (1 - product * after) + (1 - now) * g / (1 - product)
        p = p - RATE * m_hat / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def rmsprop(p, grads, decay=0.9, eps=1e-8, eps_in_sqrt=True, centered=False, momentum=0.0,
            nesterov=False, l2=0.0):
    v = mean = m = np.zeros_like(p)
    for g in grads:
        g = g + l2 * p
        v, mean = decay * v + (1 - decay) * g**2, decay * mean + (1 - decay) * g
        around = v - mean**2 if centered else v
        u = g / (np.sqrt(around + eps) if eps_in_sqrt else np.sqrt(around) + eps)
        m = momentum * m + u
        p = p - RATE * (u + momentum * m if nesterov else m)
    return p


def adagrad(p, grads, first=0.1, eps=1e-7, eps_in_sqrt=True):
    s = first
    for g in grads:
        s = s + g**2
        p = p - RATE * g / (np.sqrt(s + eps) if eps_in_sqrt else np.sqrt(s) + eps)
    return p


def lion(p, grads, b1=0.9, b2=0.99, decay=0.0):
    m = np.zeros_like(p)
    for g in grads:
        p = p - RATE * (np.sign(b1 * m + (1 - b1) * g) + decay * p)
        m = b2 * m + (1 - b2) * g
    return p


def lamb(p, grads, b1=0.9, b2=0.999, eps=1e-6, decay=0.0):
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p
        p = p - RATE * np.sqrt(np.sum(p**2) / np.sum(r**2)) * r
    return p


def rms(x):
    return np.sqrt(np.mean(x**2))


def adafactor(p, grads, factored, rate=None, momentum=0.0, decay=0.0, scaled=True, clip=1.0):
    """Algorithm 4 (factored) or 5 of the paper, V = R C / mean(R), means in place of sums."""
    row = column = v = m = 0.0
    for t, g in enumerate(grads, 1):
        beta, squared = 1 - t**-0.8, g**2 + 1e-30
        if factored and p.ndim == 2:
            row = beta * row + (1 - beta) * squared.mean(1)
            column = beta * column + (1 - beta) * squared.mean(0)
            v = np.outer(row, column) / row.mean()
        else:
            v = beta * v + (1 - beta) * squared
        u = g / np.sqrt(v)
        u = u / max(1, rms(u) / clip) * (max(1e-3, rms(p)) if scaled else 1)
        m = momentum * m + (1 - momentum) * u
        p = p - (rate or min(1e-2, t**-0.5)) * (m + decay * p)
    return p


def muon(p, grads, nesterov=True, corrected=True, decay=0.0, mu=0.95):
    if p.ndim != 2:
        return adam(p, grads, nesterov=True)
    m = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = mu * m + (1 - mu) * g
        a, b = (1 - mu ** (t + 1), 1 - mu**t) if corrected else (1, 1)
        x = mu * m / a + (1 - mu) * g / b if nesterov else m
        x = x / (np.linalg.norm(x) + 1e-8)
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
        p = p - RATE * (max(1, p.shape[1] / p.shape[0]) ** 0.5 * x + decay * p)
    return p


def soap(p, grads, b=0.95, decay=0.0, every=3, largest=3):
    if p.ndim != 2:
        return adam(p, grads, b, b)
    turned = [n <= largest for n in p.shape]
    average = [(1 - b) * x @ x.T for x in (grads[0], grads[0].T)]
    first = [np.linalg.eigh(a)[1][:, ::-1] for a in average]
    basis = [q if t else np.eye(len(q)) for q, t in zip(first, turned)]
    m, v = np.zeros_like(p), np.zeros_like(p)
    p = p - RATE * decay * p
    for t, g in enumerate(grads[1:], 1):
        q, r = basis
        m, v = b * m + (1 - b) * g, b * v + (1 - b) * (q.T @ g @ r) ** 2
        u = (q.T @ m @ r) / (1 - b**t) / (np.sqrt(v / (1 - b**t)) + 1e-8)
        p = p - RATE * (q @ u @ r.T + decay * p)
        average = [b * a + (1 - b) * x @ x.T for a, x in zip(average, (g, g.T))]
        if t % every == 0:
            again = [np.linalg.qr(a @ q)[0] for a, q in zip(average, basis)]
            basis = [new if t else old for new, old, t in zip(again, basis, turned)]
    return p


FORMULAS = {
    "sgd": (optim.sgd(RATE), sgd),
    "momentum": (optim.sgd(RATE, momentum=0.9), lambda p, g: sgd(p, g, 0.9)),
    "nesterov": (
        optim.sgd(RATE, momentum=0.9, nesterov=True), lambda p, g: sgd(p, g, 0.9, nesterov=True)
    ),
    "dampened, decayed": (
        optim.sgd(RATE, momentum=0.9, dampening=0.3, weight_decay=0.1),
        lambda p, g: sgd(p, g, 0.9, dampening=0.3, decay=0.1),
    ),
    "adam": (optim.adam(RATE), adam),
    "adam, other constants": (
        optim.adam(RATE, b1=0.5, b2=0.7, eps=1e-3, eps_root=1e-2),
        lambda p, g: adam(p, g, 0.5, 0.7, 1e-3, 1e-2),
    ),
    "adam without momentum": (optim.adam(RATE, b1=0.0), lambda p, g: adam(p, g, b1=0.0)),
    "adam with L2": (optim.adam(RATE, weight_decay=0.1), lambda p, g: adam(p, g, l2=0.1)),
    "adamw": (optim.adamw(RATE, weight_decay=0.1), lambda p, g: adam(p, g, decay=0.1)),
    "amsgrad": (optim.amsgrad(RATE, b2=0.9), lambda p, g: amsgrad(p, g, True)),
    "amsgrad, PyTorch's": (
        optim.amsgrad(RATE, b2=0.9, correct_before_max=False), lambda p, g: amsgrad(p, g, False)
    ),
    "nadam": (optim.nadam(RATE), lambda p, g: adam(p, g, nesterov=True)),
    "nadam, PyTorch's": (optim.nadam(RATE, momentum_decay=4e-3), warmed_nadam),
    "rmsprop": (optim.rmsprop(RATE), rmsprop),
    "rmsprop, PyTorch's": (
        optim.rmsprop(RATE, decay=0.99, eps_in_sqrt=False, weight_decay=0.1),
        lambda p, g: rmsprop(p, g, 0.99, eps_in_sqrt=False, l2=0.1),
    ),
    "rmsprop, centred, momentum": (
        optim.rmsprop(RATE, eps=1e-3, centered=True, momentum=0.5),
        lambda p, g: rmsprop(p, g, eps=1e-3, centered=True, momentum=0.5),
    ),
    "rmsprop, nesterov": (
        optim.rmsprop(RATE, momentum=0.5, nesterov=True),
        lambda p, g: rmsprop(p, g, momentum=0.5, nesterov=True),
    ),
    "adagrad": (optim.adagrad(RATE), adagrad),
    "adagrad, PyTorch's": (
        optim.adagrad(RATE, 0.0, 1e-10, eps_in_sqrt=False),
        lambda p, g: adagrad(p, g, 0.0, 1e-10, False),
    ),
    "lion": (optim.lion(RATE, weight_decay=0.1), lambda p, g: lion(p, g, decay=0.1)),
    "lamb": (optim.lamb(RATE, weight_decay=0.1), lambda p, g: lamb(p, g, decay=0.1)),
    "adafactor": (
        optim.adafactor(min_dim_size_to_factor=2), lambda p, g: adafactor(p, g, True)
    ),
    "adafactor, not factored": (optim.adafactor(), lambda p, g: adafactor(p, g, False)),
    "adafactor, bare": (
        optim.adafactor(
            RATE, min_dim_size_to_factor=2, multiply_by_parameter_scale=False,
            clipping_threshold=None,
        ),
        lambda p, g: adafactor(p, g, True, RATE, scaled=False, clip=np.inf),
    ),
    "adafactor, momentum, decayed": (
        optim.adafactor(RATE, min_dim_size_to_factor=2, momentum=0.9, weight_decay=0.1),
        lambda p, g: adafactor(p, g, True, RATE, momentum=0.9, decay=0.1),
    ),
    "muon": (optim.muon(RATE), muon),
    "muon, Jordan's": (
        optim.muon(RATE, bias_correction=False, weight_decay=0.1),
        lambda p, g: muon(p, g, corrected=False, decay=0.1),
    ),
    "muon, plain momentum": (
        optim.muon(RATE, nesterov=False), lambda p, g: muon(p, g, nesterov=False)
    ),
    "soap, one side": (
        optim.soap(RATE, every=3, largest=3, weight_decay=0.1), lambda p, g: soap(p, g, decay=0.1)
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_ten_steps_equal_the_formula(name, x64):
    optimizer, formula = FORMULAS[name]
    params, grads = draw(0), [draw(seed) for seed in range(1, 11)]
    expected = {k: formula(params[k], [g[k] for g in grads]) for k in params}
    update = jax.jit(optimizer.update)
    got = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(got)
    for g in grads:
        updates, state = update(g, state, got)
        got = optim.apply_updates(got, updates)
    chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-15)


def test_soap_turns_both_sides(x64):
    """Of a square matrix: a side longer than the other has eigenvectors of 0 at first, any."""
    rng = np.random.default_rng(0)
    p, *grads = rng.normal(size=(11, 4, 4))
    optimizer, got = optim.scale_by_soap(every=3), jnp.asarray(p)
    state, update = optimizer.init(got), jax.jit(optimizer.update)
    for g in grads:
        direction, state = update(jnp.asarray(g), state)
        got = got - RATE * direction
    chex.assert_trees_all_close(got, soap(p, grads, largest=4), rtol=1e-11, atol=1e-14)
