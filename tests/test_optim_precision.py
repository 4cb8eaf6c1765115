"""Optimisers of 16-bit and complex parameters: the mathematics is float32's, against float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optim import ALL

from fbprop import optim

PARAMS = {"w": np.linspace(-2, 3, 6).reshape(2, 3), "b": np.array([1e-4, 1.0, -300.0])}


# The others are chains of these.
NAMES = [
    name for name in ALL if name not in ("sgd", "adamw", "by path", "frozen")
    and name != "soap"  # the basis of a null space is any
]


def one_step(params):
    """An update of every optimiser, by gradients that are exact in any precision, and its state."""
    grads = jax.tree.map(lambda p: -2 * p, params)
    return {n: ALL[n].update(grads, ALL[n].init(params), params) for n in NAMES}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_computed_in_float32(dtype):
    low = jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)
    got = jax.device_get(jax.jit(one_step)(low))
    with jax.enable_x64(True):
        high = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(np.float64)), low)
        exact = jax.device_get(jax.jit(one_step)(high))
    for name in NAMES:
        (updates, state), (expected, wide) = got[name], exact[name]
        assert {x.dtype.name for x in jax.tree.leaves(updates)} == {dtype}, name
        assert {x.dtype.name for x in jax.tree.leaves(state)} <= {"float32", "int32"}, name
        # Newton-Schulz amplifies rounding: its polynomial's slope is 3.4 at each of five steps.
        rtol = 1e-3 if name == "muon" else 2e-5
        if name == "clipped":  # the average is of parameters, which are rounded to 16 bits
            state, wide = state[:-1], wide[:-1]
        chex.assert_trees_all_close(
            jax.tree.map(np.float64, state), jax.tree.map(np.float64, wide), rtol=rtol, atol=1e-9
        )
        unit = float(jnp.finfo(dtype).eps)
        chex.assert_trees_all_close(
            jax.tree.map(np.float64, updates), jax.tree.map(np.float64, expected),
            rtol=unit + rtol, atol=float(jnp.finfo(dtype).smallest_subnormal) + 1e-9,
        )


def test_complex_parameters_are_pairs_of_real_ones_where_elements_stand_alone():
    """Along the real axis every optimiser moves as with real numbers, in any of the precisions."""
    real = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
    turned = jax.tree.map(lambda x: jax.lax.complex(jnp.zeros_like(x), x), real)
    names = [name for name in NAMES if name != "clipped"]  # clips values, which are ordered

    @jax.jit
    def updates(params):
        return {n: ALL[n].update(params, ALL[n].init(params), params)[0] for n in names}

    got, expected = updates(turned), updates(real)
    chex.assert_trees_all_close(
        jax.tree.map(jnp.imag, got), expected, rtol=2e-5, atol=1e-7
    )
    assert {x.dtype.name for x in jax.tree.leaves(got)} == {"complex64"}


def test_gradients_wider_than_the_parameters_do_not_widen_the_state(x64):
    params, grads = jnp.ones(3), jnp.ones(3, jnp.float64)
    params = params.astype(jnp.float32)
    for optimizer in (optim.adam(0.1), optim.sgd(0.1, momentum=0.9), optim.lion(0.1)):
        state = optimizer.init(params)
        updates, new = optimizer.update(grads, state, params)
        chex.assert_trees_all_equal_dtypes(new, state)
        assert updates.dtype == jnp.float32


def test_late_adafactor_steps_still_learn():
    """1 − β is t^−0.8, 1.6e-8 at the end of int32, and not what is left of a rounded β."""
    part = optim.scale_by_factored_rms()
    state = part.init(jnp.zeros(()))
    late = state._replace(count=jnp.int32(10**7), slots=state.slots | {"full": jnp.float32(0)})
    updates, _ = part.update(jnp.float32(1), late)
    np.testing.assert_allclose(updates, (10**7 + 1) ** 0.4, rtol=1e-5)
