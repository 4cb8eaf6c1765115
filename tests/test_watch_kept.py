"""`watch.kept`: value by value what `explain` counts equation by equation."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import fbprop
from fbprop import watch

X, W = jnp.arange(15.0).reshape(3, 5) / 7, jnp.ones((5, 5)) / 5


def network(w, x):
    """Everything that contains equations, under a scope."""
    with jax.named_scope("encoder"):
        h = jax.nn.silu(x @ w)
    h = jax.jit(lambda h: jnp.sin(h) * h)(h)
    with jax.named_scope("loop"):
        c, hs = lax.scan(lambda c, t: (jnp.tanh(c @ w + t),) * 2, h[0], h)
    hs = lax.cond(c[0] > 0, jnp.sin, lambda hs: jnp.exp(hs) * 2.0, hs)
    hs = jax.checkpoint(lambda hs: jnp.sin(jnp.sin(hs)))(hs)
    return jnp.sum(jax.nn.log_softmax(hs))


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
def test_bytes_are_those_of_explain_and_the_largest_come_first(argnums):
    found = watch.kept(network, W, X, argnums=argnums)
    assert found.bytes == fbprop.explain(network, W, X, argnums=argnums).kept
    sizes = [v.bytes for v in found.values]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == found.bytes == sum(r["bytes"] for r in found.rows())


def test_who_made_it_and_for_whom():
    rows = {v.name: v for v in watch.kept(network, W, X, argnums=(0, 1)).values}
    assert rows["argument w"].readers == ("encoder/dot_general", "loop/scan")
    assert rows["argument w"].type == "f32[5,5]"
    assert rows["encoder/dot_general"].readers == ("encoder/jax.nn.silu",)
    assert (rows["a carried value"].steps, rows["a carried value"].type) == ((3,), "f32[5]")
    assert rows["a carried value"].readers == ("loop/dot_general",)
    assert rows["(jax.nn.log_softmax)"].type == "f32[3,1]"
    assert rows["(cond)"].bytes == X.nbytes


def test_loops_of_a_deep_network_and_what_is_made_again():
    def loss(w, x):
        def step(x, _):
            h = jnp.exp(x @ w)
            return (h - jnp.mean(h, -1, keepdims=True)) * 3.0, None

        return jnp.sum(lax.scan(step, x, None, length=7)[0] ** 2)

    args = jax.ShapeDtypeStruct((64, 64), "float32"), jax.ShapeDtypeStruct((512, 64), "float32")
    found = watch.kept(loss, *args)
    assert found.bytes == fbprop.explain(loss, *args).kept
    (stacked,) = [v for v in found.values if v.primitive == "exp"]
    assert (stacked.steps, stacked.bytes) == ((7,), 7 * 512 * 64 * 4)


def test_a_table_as_text_and_what_is_no_function():
    def loss(w, x):
        with jax.named_scope("layer"):
            h = jnp.tanh(x @ w)
        return jnp.sum(h * h) + jnp.sum(h ** 3) + jnp.sum(jnp.exp(h) * h)

    text = str(watch.kept(loss, W, X))
    assert "layer/tanh" in text
    assert "layer/tanh, mul and 1 more" in text
    with pytest.raises(TypeError, match="explain is about a function, got 3"):
        watch.kept(3, X)
