"""Gradients and whole steps of networks that several devices share, by four strategies.

``data`` and ``model`` are the mesh's axes. The batch is split over ``data``; parameters are whole
on every device, or each is split over ``model``, or over ``data`` where ``fully`` is 1. Sizes are
large enough for values to be computed again. Rows named ``explicit`` have mesh axes of that type,
for which JAX takes these networks only where parameters are whole, and the LSTM nowhere: it finds
no sharding for the product of two factors that are split over ``data``, which is in its gradient.
"""

from __future__ import annotations

import functools
import operator

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.row import Row, named, row
from benchmarks.rows.elementwise import cross_entropy
from benchmarks.rows.image_steps import resnet, resnet_params
from benchmarks.rows.recurrent import lstm_layer, recurrent_weights
from benchmarks.rows.sequence_steps import gpt_loss, gpt_params
from benchmarks.rows.steps import classification, dense_layers, mlp, training_step
from fbprop import mesh
from fbprop.mesh.layouts import is_spec

STRATEGIES = [(8, 1, 0), (8, 1, 1), (1, 8, 0), (2, 4, 0)]  # data, model, fully
SIZES = {"devices": 8, "smoke": STRATEGIES[-1:], "small": STRATEGIES, "full": STRATEGIES}


def of_mlp(draw):
    batch = draw.normal(64, 32), draw.integers(8, 64)
    return classification(mlp), dense_layers(draw, 32, 64, 64, 8), batch


def looked_up(table, indices):
    """Rows of a table, which lie where their indices do, as types with shardings need to be told.

    Args:
      indices: whose type has a sharding, over ``data``.
    """
    where = NamedSharding(jax.typeof(indices).sharding.mesh, P("data"))
    return table.at[indices].get(out_sharding=where)


def of_gpt(draw, look_up=operator.getitem):
    loss, tokens = gpt_loss(4, look_up=look_up), draw.integers(64, 16, 33)
    return loss, gpt_params(draw, 2, 32, 32, 64), [tokens]


def of_convnet(draw):
    batch = draw.normal(16, 16, 16, 3), draw.integers(8, 16)
    return classification(resnet), resnet_params(draw, 1, 8), batch


def of_lstm(draw, start=lambda xs: None):
    params = recurrent_weights(draw, 4, 16, 16), dense_layers(draw, 16, 8)

    def loss(params, xs, labels):
        cell, head = params
        xs = xs.swapaxes(0, 1)
        return cross_entropy(mlp(head, lstm_layer(*cell, xs, start(xs))), labels.T)

    return loss, params, [draw.normal(16, 32, 16), draw.integers(8, 16, 32)]


def of_embedding(draw, look_up=operator.getitem):
    params = draw.normal(64, 32), dense_layers(draw, 32, 8)

    def loss(params, words, labels):
        table, layers = params
        return cross_entropy(mlp(layers, look_up(table, words)), labels)

    return loss, params, [draw.integers(64, 64, 8), draw.integers(8, 64, 8)]


explicit_gpt = functools.partial(of_gpt, look_up=looked_up)
explicit_lstm = functools.partial(of_lstm, start=lambda xs: 0 * xs[0])  # as wide as its inputs
explicit_embedding = functools.partial(of_embedding, look_up=looked_up)


def layout(model, fully):
    """Where parameters are; the batch is over ``data``."""
    if fully:
        return mesh.fully_sharded("data")
    return mesh.replicated() if model == 1 else mesh.fully_sharded("model", batch="data")


def sharded_gradient(network, draw, data, model, fully, explicit=False, **figures) -> Row:
    """Value and gradient, which lies where the parameters do."""
    loss, params, batch = network(draw)

    def places(devices):
        over, params_at = _places(devices, data, model, fully, params, explicit)
        batch_at = [NamedSharding(over, P("data"))] * len(batch)
        return (params_at, *batch_at), (None, params_at)

    return Row(lambda ad: ad.value_and_grad(loss), (params, *batch), places=places, **figures)


def sharded_step(network, draw, data, model, fully, **figures) -> Row:
    """A whole step with Adam, whose moments lie where the parameters do."""
    loss, params, batch = network(draw)
    one = training_step(loss, params, batch, **figures)

    def places(devices):
        over, params_at = _places(devices, data, model, fully, params)
        whole = NamedSharding(over, P())
        state = params_at, [whole, *jax.tree.leaves(params_at) * 2]
        batch_at = tuple(NamedSharding(over, P("data")) for _ in batch)
        return (state, batch_at, whole), (state, None)

    return Row(one.build, one.inputs, probe=one.probe, carries=True, tolerance=one.tolerance,
               places=places)


def _places(devices, data, model, fully, params, explicit=False):
    kind = (AxisType.Explicit if explicit else AxisType.Auto,) * 2
    over = Mesh(devices[:data * model].reshape(data, model), ("data", "model"), axis_types=kind)
    specs = layout(model, fully).specs(over, params)
    return over, jax.tree.map(lambda spec: NamedSharding(over, spec), specs, is_leaf=is_spec)


# Batch statistics of the convnet's three stages: sums over devices are added up in another order.
CONVNET = {"tolerance": 1e-4}


def _register(name, sizes, kind, network, **figures):
    def make(draw, data, model, fully):
        return kind(network, draw, data, model, fully, **figures)

    row("sharded", **sizes)(named(f"{name}_sharded", make, make))


_register("mlp", SIZES, sharded_gradient, of_mlp)
_register("gpt", SIZES, sharded_gradient, of_gpt)
_register("convnet", SIZES, sharded_gradient, of_convnet, **CONVNET)
_register("lstm", SIZES, sharded_gradient, of_lstm)
_register("embedding", SIZES, sharded_gradient, of_embedding)
_register("mlp_step", SIZES, sharded_step, of_mlp)
_register("gpt_step", SIZES, sharded_step, of_gpt)
_register("embedding_step", SIZES, sharded_step, of_embedding)

EXPLICIT = {"devices": 8, **dict.fromkeys(("smoke", "small", "full"), STRATEGIES[:1])}
_register("mlp_explicit", EXPLICIT, sharded_gradient, of_mlp, explicit=True)
_register("convnet_explicit", EXPLICIT, sharded_gradient, of_convnet, explicit=True, **CONVNET)
_register("gpt_explicit", EXPLICIT, sharded_gradient, explicit_gpt, explicit=True)
_register("embedding_explicit", EXPLICIT, sharded_gradient, explicit_embedding, explicit=True)
