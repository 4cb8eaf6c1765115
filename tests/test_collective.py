"""Collectives along an axis of `jax.vmap`, inside and around what is differentiated: as JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop

BACK = [(0, 1), (1, 2), (2, 0)]
CUBE = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 3)), "float32")

# Functions of one example, along the axis "b" of a batch of three; and of pairs, along "a" too.
ONE = {
    "psum": lambda x: jnp.sin(lax.psum(x, "b")) * x,
    "psum of several": lambda x: lax.psum((x, x * x), "b")[1] * x,
    "pmean": lambda x: (x - lax.pmean(x, "b")) * lax.rsqrt(lax.pmean(x * x, "b")),
    "pmax of a constant": lambda x: lax.pmax(lax.stop_gradient(x), "b") * x,
    "all_gather": lambda x: lax.all_gather(x, "b", axis=1) * x[:, None],
    "all_gather tiled": lambda x: jnp.sin(lax.all_gather(x, "b", tiled=True)),
    "all_to_all": lambda x: jnp.sin(lax.all_to_all(x, "b", 0, 1)),
    "ppermute": lambda x: jnp.sin(lax.ppermute(x, "b", BACK)) * x,
    "pshuffle": lambda x: jnp.sin(lax.pshuffle(x, "b", [2, 0, 1])) * x,
    "pswapaxes": lambda x: jnp.sin(lax.pswapaxes(x, "b", 0)) * x,
    "psum_scatter": lambda x: jnp.sin(lax.psum_scatter(x, "b")),
    "psum_scatter tiled": lambda x: jnp.sin(
        lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True)
    ),
    "axis_index": lambda x: x * lax.axis_index("b").astype(x.dtype),
    "in a loop": lambda x: lax.scan(
        lambda c, _: (jnp.sin(lax.psum(c, "b")), None), x, None, length=2
    )[0],
    "in a branch": lambda x: lax.cond(
        lax.axis_index("b") > 0, lambda x: x, jnp.sin, lax.psum(x, "b") * x
    ),
    "made again": jax.checkpoint(lambda x: jnp.sin(lax.psum(x, "b")) * x),
    "complex": lambda x: jnp.abs(lax.psum(lax.complex(x, x * x), "b")) * x,
}
TWO = {
    "psum over both": lambda x: jnp.sin(lax.psum(x, ("b", "a"))) * x,
    "psum over each": lambda x: lax.psum(jnp.sin(lax.psum(x, "a")) * x, "b") * x,
    "all_gather over each": lambda x: lax.all_gather(lax.all_gather(x, "a"), "b") * x,
    "mixed": lambda x: lax.ppermute(lax.pmean(x, "a"), "b", BACK) * lax.psum_scatter(x, "a"),
}


def batched(fun, depth):
    """The sum of the function over a batch, whose axes have names."""
    for name in "ba"[:depth]:
        fun = jax.vmap(fun, axis_name=name)
    return lambda x: jnp.sum(fun(x))


def all_gradients(grad):
    """Of every function: the names inside, the outer one outside, and of a gradient's sine."""

    def gradients(x):
        found = {name: grad(batched(fun, 1))(x) for name, fun in ONE.items()}
        found |= {name: grad(batched(fun, 2))(x) for name, fun in TWO.items()}
        for name, fun in TWO.items():
            split = jax.vmap(grad(batched(fun, 1)), axis_name="a")
            found[f"{name}, one outside"] = split(x)
        for name in ("psum", "pmean", "psum_scatter"):
            inner = grad(batched(ONE[name], 1))
            found[f"{name}, twice"] = grad(lambda x, inner=inner: jnp.sum(jnp.sin(inner(x))))(x)
        return found

    return gradients


def test_every_collective_over_every_kind_of_axis():
    both = jax.jit(lambda x: (all_gradients(fbprop.grad)(x), all_gradients(jax.grad)(x)))
    got, expected = both(CUBE)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("collective", [lax.pmax, lax.pmin])
def test_what_jax_does_not_differentiate_is_refused(collective):
    fun = batched(lambda x: collective(x, "b") * x, 1)
    with pytest.raises(NotImplementedError, match="not implemented"):
        jax.grad(fun)(CUBE)
    name = collective.__name__
    with pytest.raises(NotImplementedError, match=f"needs a rule, got none for '{name}'"):
        fbprop.grad(fun)(CUBE)
