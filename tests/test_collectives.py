"""No choice of ours sends anything between devices: compiled for 8 of them, next to `jax.grad`.

Parameters and batch laid out as by a user: data parallel, fully sharded, tensor parallel, and both
at once; XLA finds what has to be sent. Sizes are large enough for values to be computed again.
"""

import math
import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fbprop
from benchmarks.row import Draw
from benchmarks.rows.elementwise import cross_entropy
from benchmarks.rows.image_steps import resnet, resnet_params
from benchmarks.rows.recurrent import lstm_layer, recurrent_weights
from benchmarks.rows.sequence_steps import gpt_loss, gpt_params
from benchmarks.rows.steps import classification, dense_layers, mlp
from benchmarks.targets import kernels

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def of_mlp(draw):
    batch = draw.normal(64, 32), draw.integers(8, 64)
    return classification(mlp), dense_layers(draw, 32, 64, 64, 8), batch


def of_gpt(draw):
    return gpt_loss(4), gpt_params(draw, 2, 32, 32, 64), [draw.integers(64, 16, 33)]


def of_convnet(draw):
    batch = draw.normal(16, 16, 16, 3), draw.integers(8, 16)
    return classification(resnet), resnet_params(draw, 1, 8), batch


def of_lstm(draw):
    params = recurrent_weights(draw, 4, 16, 16), dense_layers(draw, 16, 8)

    def loss(params, xs, labels):
        cell, head = params
        return cross_entropy(mlp(head, lstm_layer(*cell, xs.swapaxes(0, 1))), labels.T)

    return loss, params, [draw.normal(16, 32, 16), draw.integers(8, 16, 32)]


def of_embedding(draw):
    params = draw.normal(64, 32), dense_layers(draw, 32, 8)
    loss = lambda params, words, labels: cross_entropy(mlp(params[1], params[0][words]), labels)
    return loss, params, [draw.integers(64, 64, 8), draw.integers(8, 64, 8)]


def dimension(x, size):
    """The largest dimension that so many devices can share; None without one."""
    fitting = [d for d in range(x.ndim) if x.shape[d] % size == 0 and x.shape[d] >= 2 * size]
    return max(fitting, key=lambda d: x.shape[d], default=None)


def over(axis, d):
    return P() if d is None else P(*[None] * d, axis)


LAYOUTS = {  # of a parameter; the batch is over "data" wherever there is one
    "data parallel": ((8, 1), lambda x: P()),
    "fully sharded": ((8, 1), lambda x: over("data", dimension(x, 8))),
    "tensor parallel": ((1, 8), lambda x: over("model", dimension(x, 8))),
    "both": ((2, 4), lambda x: over("model", dimension(x, 4))),
}


def collectives(text):
    """{kind: (how many run, bytes they result in)} of a compiled program."""
    computations, entry = kernels.parse(text)
    count, sizes = Counter(), Counter()

    def look(name, times):
        for i in computations[name]:
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                count[kind] += times
                sizes[kind] += times * i.bytes
            inner = re.findall(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)", i.rest)
            for each in inner if i.opcode in ("while", "call", "async-start") else ():
                look(each, times * kernels.trips(i))

    look(entry, 1)
    return count, sizes


def sent(ad, network, layout):
    loss, params, batch = network(Draw())
    shape, spec = LAYOUTS[layout]
    mesh = Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), ("data", "model"))
    place = lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, p))
    params = jax.tree.map(lambda x: place(x, spec(x)), params)
    batch = [place(x, P("data")) for x in batch]
    shardings = None, jax.tree.map(lambda x: x.sharding, params)
    run = jax.jit(ad.value_and_grad(loss), out_shardings=shardings)
    return collectives(run.lower(params, *batch).compile().as_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", [of_mlp, of_gpt, of_convnet, of_lstm, of_embedding])
def test_no_more_is_sent_than_by_jax(network, layout):
    (count, sizes), (jax_count, jax_sizes) = (sent(ad, network, layout) for ad in (fbprop, jax))
    assert jax_count.total() > 0
    assert count.total() <= jax_count.total(), (count, jax_count)
    assert sizes.total() <= jax_sizes.total(), (sizes, jax_sizes)


def test_products_of_a_loop_are_sent_once_a_chunk():
    """As the README says: an eighth of the bytes, which JAX sends at every step."""
    (count, sizes), (jax_count, jax_sizes) = (
        sent(ad, of_lstm, "data parallel") for ad in (fbprop, jax)
    )
    assert 6 * count.total() <= jax_count.total()
    assert 7.5 * sizes.total() <= jax_sizes.total()
