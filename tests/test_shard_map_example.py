"""A pipeline and ring attention by `jax.shard_map`: gradients against those of one device."""

import argparse
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop

FILE = pathlib.Path(__file__).parent.parent / "examples" / "shard_map.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("shard_map_example", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same_gradients(mine, one, inputs):
    """In float64, to 1e-12 of the largest element."""
    inputs = jax.tree.map(lambda x: x.astype(jnp.float64), inputs)
    argnums = tuple(range(len(inputs)))
    value, found = jax.jit(fbprop.value_and_grad(mine, argnums))(*inputs)
    expected_value, expected = jax.jit(jax.value_and_grad(one, argnums))(*inputs)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * float(jnp.max(jnp.abs(b))))


def test_a_pipeline(example, x64):
    same_gradients(*example.pipeline_losses(jax.devices(), features=5, batch=12))


def by_definition(q, k, v):
    """Softmax attention of each step to itself and those before."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(jnp.float64(q.shape[-1]))
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.mean(jnp.sin(jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)))


def test_ring_attention(example, x64):
    mine, _, inputs = example.ring_losses(jax.devices()[:4], length=12, heads=2, features=3)
    same_gradients(mine, by_definition, inputs)


def test_what_is_printed(example, capsys):
    example.main(argparse.Namespace(devices=4, length=16, plot=None))
    found = re.findall(r"^(.*): gradient within (\S+) of one device's; temporary memory of a "
                       r"device \d+ kB, of one alone \d+ kB$", capsys.readouterr().out, re.M)
    assert [name for name, _ in found] == [
        "pipeline of 2 stages, 4 pieces", "ring attention, 16 steps on 2 devices",
        "ring attention, 16 steps on 4 devices"]
    assert all(float(difference) < 1e-5 for _, difference in found)
