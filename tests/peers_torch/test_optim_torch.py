"""Optimisers against PyTorch's, on the same gradients, for 10 steps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fbprop import optim

RATE = 0.01
SHAPES = {"w": (3, 5), "b": (5,)}

PAIRS = {
    "sgd": (optim.sgd(RATE), torch.optim.SGD, {}),
    "momentum": (optim.sgd(RATE, momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (
        optim.sgd(RATE, momentum=0.9, nesterov=True),
        torch.optim.SGD, {"momentum": 0.9, "nesterov": True},
    ),
    "dampening, L2": (
        optim.sgd(RATE, momentum=0.9, dampening=0.5, weight_decay=0.1),
        torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    ),
    "adam": (optim.adam(RATE), torch.optim.Adam, {}),
    "adam, L2": (optim.adam(RATE, weight_decay=0.1), torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (optim.adamw(RATE, weight_decay=0.01), torch.optim.AdamW, {"weight_decay": 0.01}),
    "amsgrad": (
        optim.amsgrad(RATE, b2=0.9, correct_before_max=False),
        torch.optim.Adam, {"betas": (0.9, 0.9), "amsgrad": True},
    ),
    "nadam": (optim.nadam(RATE, momentum_decay=4e-3), torch.optim.NAdam, {}),
    "rmsprop": (optim.rmsprop(RATE, 0.99, eps_in_sqrt=False), torch.optim.RMSprop, {}),
    "rmsprop, centered, momentum": (
        optim.rmsprop(RATE, 0.99, eps_in_sqrt=False, centered=True, momentum=0.9),
        torch.optim.RMSprop, {"centered": True, "momentum": 0.9},
    ),
    "adagrad": (
        optim.adagrad(RATE, 0.0, 1e-10, eps_in_sqrt=False), torch.optim.Adagrad, {}
    ),
}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS.values(), ids=PAIRS)
def test_ten_steps_are_the_same(ours, theirs, options):
    start = arrays(0)
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    other = theirs(tensors.values(), lr=RATE, **options)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        state, update = ours.init(params), jax.jit(ours.update)
        for step in range(10):
            gradient = arrays(step + 1)
            updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
            params = optim.apply_updates(params, updates)
            for name, tensor in tensors.items():
                tensor.grad = torch.tensor(gradient[name])
            other.step()
            for name, tensor in tensors.items():
                np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=1e-6)
                assert not np.allclose(params[name], start[name], rtol=1e-6)
