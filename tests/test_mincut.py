"""What programs for GPUs store: the cheapest by trying all, and gradients from it are the same."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop.core import gpu_plan, recompute
from fbprop.core.mincut import cut
from fbprop.core.opaque import either

KEYS = jax.random.split(jax.random.key(0), 3)


def draw(i, *shape):
    return jax.random.normal(KEYS[i], shape)


def random_values(seed):
    """Values 0 to 8, what each is made from (None: it cannot be), and costs."""
    rng = np.random.default_rng(seed)
    made_from = [
        None if v < 2 or rng.random() < 0.2 else {int(rng.integers(v)) for _ in range(2)}
        for v in range(9)
    ]
    return made_from, *rng.integers(0, 6, (2, 9)).tolist(), sorted({8, int(rng.integers(2, 8))})


def makes(stored, made_from, wanted):
    """Values that have to be made, if these are stored; None if one cannot be."""
    made, todo = set(), [v for v in wanted if v not in stored]
    while todo:
        v = todo.pop()
        if made_from[v] is None:
            return None
        if v not in made:
            made.add(v)
            todo += [u for u in made_from[v] if u not in stored]
    return made


def test_a_cut_costs_as_little_as_the_best_of_all_choices():
    for seed in range(25):
        made_from, to_store, to_make, wanted = random_values(seed)

        def cost(stored):
            made = makes(stored, made_from, wanted)
            at = lambda costs, values: sum(costs[v] for v in values)
            return np.inf if made is None else at(to_store, stored) + at(to_make, made)

        stored, made = cut(wanted, *(x.__getitem__ for x in (made_from, to_store, to_make)))
        best = min(cost(s) for n in range(10) for s in itertools.combinations(range(9), n))
        assert cost(stored) == best
        assert makes(stored, made_from, wanted) == set(made)


def test_of_ways_that_cost_the_same_the_fewest_are_made_again():
    chain = [None, {0}, {1}, {2}]
    always = lambda cost: lambda v: cost
    assert cut([3], chain.__getitem__, always(7), always(0)) == ([3], [])
    assert cut([3, 1], chain.__getitem__, always(7), always(0)) == ([1], [3, 2])


def layers(weights, x):
    """A norm, a product, GELU, a gate, a rectifier, a residual."""
    for w in weights:
        centred = x - x.mean(-1, keepdims=True)
        y = centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * 2
        x = x + jax.nn.relu(jax.nn.gelu(y @ w + 1) * jnp.tanh(x))
    return jnp.sum(x * x)


def weights(n, size):
    return [draw(i, size, size) / size for i in range(n)]


@pytest.fixture
def as_on_gpus(monkeypatch):
    """The values of a GPU's program are used, of any size; how many there were is counted."""
    chosen = []

    def taken(first, again, on_gpu):
        chosen.append(on_gpu is not first)
        return either(first, on_gpu, again)  # as CPUs take it

    monkeypatch.setattr(recompute, "either", taken)
    for module in gpu_plan, recompute:
        monkeypatch.setattr(module, "SMALLEST", 1)
        monkeypatch.setattr(module, "FEWEST", 0)
    return chosen


@pytest.mark.usefixtures("x64")
def test_the_gradient_is_the_same(as_on_gpus):
    args = weights(1, 5), draw(0, 3, 5)

    def squares(grad, *args):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(grad(layers, (0, 1))(*args)))

    def run(grad):
        second = jax.vmap(grad(functools.partial(squares, grad), 1), (None, 0))
        return jax.jit(lambda w, x: (grad(layers, (0, 1))(w, x), second(w, jnp.stack([x, -x]))))(
            *args
        )

    ours = run(fbprop.grad)
    assert sum(as_on_gpus) > 10
    chex.assert_trees_all_close(ours, run(jax.grad), rtol=1e-11, atol=1e-13)


def test_more_is_made_again_on_gpus():
    def again(platform):
        types = jax.eval_shape(lambda: (weights(6, 64), draw(0, 128, 64)))
        found = fbprop.explain(layers, *types, argnums=(0, 1), platform=platform)
        return sum(line.again for line in found.lines) // (128 * 64 * 4)

    assert again("cuda") > again("cpu") > 6


def test_barriers_stand_in_programs_for_gpus_alone():
    step = jax.jit(fbprop.grad(layers, (0, 1)))
    types = jax.eval_shape(lambda: (weights(6, 64), draw(0, 128, 64)))
    text = lambda platform: step.trace(*types).lower(lowering_platforms=(platform,)).as_text()
    assert text("cuda").count("optimization_barrier") > 6
    assert "optimization_barrier" not in text("tpu")
