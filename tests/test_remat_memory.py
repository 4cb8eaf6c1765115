"""Where `jax.checkpoint` asks for less memory, no more is taken than `jax.grad` takes."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import fbprop

D = 64
KIB = 1024


def block(x, w, v):
    return x + jnp.tanh(jnp.sin(x) @ w) @ v


def same_weights(x, w, v):
    """The factors of the weights' gradients are not collected over the steps."""
    step = jax.checkpoint(lambda x: block(x, w, v))
    return jnp.sum(lax.scan(lambda x, _: (step(x), None), x, None, length=8)[0] ** 2)


@jax.checkpoint
def of_the_scan(x, w, v):
    return jnp.sum(lax.scan(lambda x, _: (block(x, w, v), None), x, None, length=8)[0] ** 2)


def both(x, w, v):
    """A segment of steps and each of its steps; a step that adds to what is not needed again."""
    step = jax.checkpoint(lambda x, total: (jnp.tanh(block(x, w, v)), total + jnp.cos(x)))
    steps = jax.checkpoint(lambda c: lax.scan(lambda c, _: (step(*c), None), c, None, length=4)[0])
    return jnp.sum(lax.scan(lambda c, _: (steps(c), None), (x, x), None, length=4)[0][1])


def mapped(x, w, v):
    """A loss over pieces, whose logits are never there at once."""
    piece = jax.checkpoint(lambda x: jax.nn.logsumexp(x @ w, -1).sum())
    return jnp.sum(lax.map(piece, x.reshape(8, -1, D)))


def attention(x, w, v):
    heads = lambda y: y.reshape(len(y), 4, -1)
    scores = jnp.einsum("thd,shd->hts", heads(x @ w), heads(x @ v.T))
    values = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, -1), heads(x))
    return x + values.reshape(x.shape)


def norm(x, w, v):
    y = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return x + jax.nn.gelu(y @ w) @ v


def gate(x, w, v):
    return x + jax.nn.silu(x @ w) * (x @ v.T)


LAYERS = [
    (attention, "float32", True), (attention, "float16", True), (attention, "bfloat16", True),
    (attention, "float32", False), (norm, "float32", True), (norm, "float16", True),
    (norm, "bfloat16", True), (norm, "float16", False), (gate, "float32", True),
]


def layers(block, in_loop, n):
    """``n`` of one kind, each of them checkpointed."""

    def loss(x, w, v):
        step = jax.checkpoint(lambda x: block(x, w, v))
        if in_loop:
            x = lax.scan(lambda x, _: (step(x), None), x, None, length=n)[0]
        for _ in range(0 if in_loop else n):
            x = step(x)
        return jnp.sum(lax.convert_element_type(x, "float32") ** 2)

    return loss


@pytest.fixture
def temporary():
    def of_gradient(library, fun, width=2 * D, dtype="float32"):
        shapes = [(128, D), (D, width), (width, D)]
        args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        gradient = jax.jit(library.grad(fun, argnums=(0, 1, 2)))
        return gradient.lower(*args).compile().memory_analysis().temp_size_in_bytes

    return of_gradient


@pytest.mark.parametrize("fun", [same_weights, of_the_scan, both, mapped])
def test_loops_take_no_more_than_with_jax(temporary, fun):
    ours, theirs = (temporary(library, fun) for library in (fbprop, jax))
    assert ours <= theirs + 2 * KIB, (ours / theirs, ours, theirs)


@pytest.mark.parametrize(("block", "dtype", "in_loop"), LAYERS)
def test_layers_take_no_more_than_with_jax(temporary, block, dtype, in_loop):
    fun = layers(block, in_loop, 3)
    ours, theirs = (temporary(library, fun, D, dtype) for library in (fbprop, jax))
    assert ours <= theirs + 2 * KIB, (ours / theirs, ours, theirs)


def test_layers_without_a_loop_take_less_than_if_it_were_not_asked_for(temporary):
    """XLA finds what is computed a second time and keeps it after all, if it is not prevented."""

    def layers(block):
        def loss(x, w, v):
            for _ in range(6):
                x = block(x, w, v)
            return jnp.sum(x**2)

        return loss

    again, plain = (temporary(fbprop, layers(f)) for f in (jax.checkpoint(block), block))
    assert again < 0.7 * plain, again / plain
