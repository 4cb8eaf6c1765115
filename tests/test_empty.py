"""Dimensions of size 0: what the forward gives, and empty or zero gradients, as JAX's."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fbprop
from fbprop import nn, optim
from fbprop.check import random_cotangent

KEY = jax.random.key(0)
NOWHERE = jnp.zeros((0,), jnp.int32)


def made(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def conv(x, w, strides=(1, 1), padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **options)


def pool(x, initial, reducer):
    return lax.reduce_window(x, initial, reducer, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


def loop(x, w):
    return lax.scan(lambda h, x: (jnp.tanh(h @ w + x), h), jnp.zeros(x.shape[1:]), x)


def along(fun, *axes):
    """A function of [..., n, ...] for arrays without elements, along either axis."""
    return [(lambda x, a=a: fun(x, axis=a), s) for a in axes for s in ([(0, 3)], [(3, 0)])]


CONVOLUTIONS = [
    (lambda x, w, s=1 if k == 1 else 2: conv(x, w, (s, s)), [(n, h, h, c), (k, k, c, o)])
    for n, h, c, k, o in itertools.product((0, 2), (0, 3), (0, 2), (1, 3), (0, 2))
    if 0 in (n, h, c, k, o)
]
GROUPED = [
    (lambda x, w, o=options: conv(x, w, **o), [(n, h, h, 2), (k, k, c, 4)])
    for options, c in (({"feature_group_count": 2}, 1), ({"batch_group_count": 2}, 2))
    for n, h, k in ((0, 3, 3), (2, 0, 3))
]
POOLS = [
    (lambda x, r=r, i=i: pool(x, np.float32(i), r), [shape])
    for r, i in ((lax.max, -np.inf), (lax.min, np.inf), (lax.add, 0))
    for shape in ((0, 5, 5, 3), (2, 0, 5, 3), (2, 5, 5, 0))
]
REDUCTIONS = [
    row
    for fun in (
        jnp.sum, jnp.prod, jnp.mean, jnp.var, jnp.cumsum, jnp.cumprod, jnp.sort, lax.cummax,
        lax.cummin, lax.cumlogsumexp, jax.nn.softmax, jax.nn.log_softmax, jax.nn.standardize,
        jax.nn.logsumexp,
    )
    for row in along(fun, 0, 1)
]
PRODUCTS = [
    (jnp.matmul, shapes) for shapes in (
        [(0, 3), (3, 2)], [(2, 0), (0, 3)], [(2, 3), (3, 0)], [(4, 0, 3), (3, 2)], [(0,), (0,)],
        [(0, 2, 3), (0, 3, 2)], [(1500, 0), (0, 3)], [(1500, 5), (5, 0)],
    )
]
CHOOSING = [*CONVOLUTIONS, *GROUPED, *POOLS, *PRODUCTS]  # formulations, by sizes
ROWS = [
    *CHOOSING, *REDUCTIONS,
    *((lambda x, u, op=op: getattr(x.at[NOWHERE], op)(u), [(5, 3), (0, 3)])
      for op in ("add", "set", "max", "min")),
    (lambda x: x[NOWHERE], [(5, 3)]),
    (lambda x: jnp.take(x, NOWHERE, 0), [(0, 3)]),
    (lambda x: lax.dynamic_slice(x, (1,), (0,)), [(5,)]),
    (lambda x, u: lax.dynamic_update_slice(x, u, (1,)), [(5,), (0,)]),
    (lambda x: lax.pad(x, 0.0, [(-2, -3, 0)]), [(5,)]),
    (lambda x: lax.top_k(x, 0)[0], [(5,)]),
    (lambda x: jnp.tile(x, (0, 2)), [(2, 3)]),
    (lambda x: jnp.broadcast_to(x, (0, 3)), [(1, 3)]),
    (lambda x, y: x * y, [(1, 3), (0, 3)]),
    (jnp.linalg.cholesky, [(0, 0)]),
    (jnp.linalg.inv, [(0, 2, 2)]),
    (jnp.linalg.solve, [(3, 3), (3, 0)]),
    *((loop, shapes) for shapes in (
        [(0, 2, 3), (3, 3)], [(4, 0, 3), (3, 3)], [(4, 2, 0), (0, 0)],
    )),
    *((jax.nn.dot_product_attention, [s] * 3) for s in ((2, 0, 2, 3), (0, 3, 2, 3))),
    (jax.nn.dot_product_attention, [(2, 3, 2, 4), (2, 0, 2, 4), (2, 0, 2, 4)]),
]


def both(fun, operands, cotangent):
    return [ad.vjp(fun, *operands)[1](cotangent) for ad in (fbprop, jax)]


def test_rules_of_arrays_without_elements():
    """Types of all by a trace; values of those that have any, compiled as one."""
    valued = []
    for fun, shapes in ROWS:
        operands = [made(*shape) for shape in shapes]
        cotangent = random_cotangent(jax.eval_shape(fun, *operands))
        ours, theirs = jax.eval_shape(lambda *row, f=fun: both(f, *row), operands, cotangent)
        assert ours == theirs
        if (fun, shapes) in CHOOSING:
            fbprop.explain(fun, *operands, argnums=range(len(operands)))
        if any(x.size for x in ours):
            valued.append((fun, operands, cotangent))
    for ours, theirs in jax.jit(lambda: [both(*row) for row in valued])():
        for x, y in zip(ours, theirs):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_updates_of_a_table_without_rows():
    """JAX's own gradient asks for an element that is not there."""
    at = jnp.array([0, 1])
    for op in ("add", "set", "max", "min"):
        fun = lambda x, u, op=op: getattr(x.at[at], op)(u)
        dx, du = fbprop.vjp(fun, made(0, 3), made(2, 3))[1](made(0, 3))
        assert dx.shape == (0, 3)
        np.testing.assert_array_equal(du, jnp.zeros((2, 3)))


IMAGES = (0, 4, 4, 2), (2, 4, 4, 0)
SEQUENCES = (0, 5, 4), (2, 0, 4), (2, 5, 0)
TWO = functools.partial(nn.gru, 2)
LAYERS = [
    *itertools.product(
        (nn.conv(3), nn.conv(0), nn.conv(3, 1), nn.dense(3), nn.dense(0), nn.max_pool(),
         nn.avg_pool(), nn.global_avg_pool(), nn.flatten(), nn.batch_norm(), nn.layer_norm(),
         nn.rms_norm(), nn.group_norm(1)),
        IMAGES,
    ),
    *itertools.product(
        (nn.lstm(3), nn.lstm(0), nn.gru(3), nn.bidirectional(TWO), nn.attention(2),
         nn.position_embedding(8)),
        SEQUENCES,
    ),
]


def test_layers_of_inputs_without_elements():
    for layer, shape in LAYERS:

        def gradients(x, layer=layer):
            params, state = layer.init(KEY, x), layer.init_state(x)

            def loss(params, x):
                y = layer.apply(params, x, train=True, **({"state": state} if state else {}))
                return jnp.sum(y[0] if state else y)

            return [ad.grad(loss, (0, 1))(params, x) for ad in (fbprop, jax)]

        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        ours, theirs = jax.eval_shape(gradients, x)
        assert ours == theirs, (layer, shape)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_losses_of_no_examples(shape):
    labels, none = jnp.zeros(shape[:-1], jnp.int32), jnp.zeros(shape[:-1], bool)
    losses = [
        lambda z: nn.softmax_cross_entropy(z, labels),
        lambda z: nn.softmax_cross_entropy(z, labels, label_smoothing=0.1, where=none),
        lambda z: nn.mean_squared_error(z, 0 * z),
    ]
    for loss in losses:
        (value, ours), (expected, theirs) = (
            jax.jit(ad.value_and_grad(loss))(made(*shape)) for ad in (fbprop, jax)
        )
        np.testing.assert_array_equal(value, expected)
        assert ours.shape == theirs.shape == shape


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion", "lamb", "adafactor", "rmsprop"])
def test_steps_of_parameters_without_elements(name):
    optimizer = getattr(optim, name)(0.1)
    params = {"w": jnp.zeros((3, 0)), "v": jnp.zeros((0,)), "b": jnp.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert np.isfinite(updates["b"]).all()
