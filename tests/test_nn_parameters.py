"""Tables of layers, counting and parting parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import nn, optim

KEY = jax.random.key(0)
PARAMS = {"encoder": {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
          "head": {"kernel": jnp.ones((3, 5), jnp.bfloat16)}}


def test_count_parameters():
    assert nn.count_parameters(PARAMS) == 6 + 3 + 15
    assert nn.count_parameters({"scalar": jnp.ones(()), "hole": None}) == 1
    assert nn.count_parameters(jax.eval_shape(lambda: PARAMS)) == 24


@pytest.mark.parametrize("where", [
    "encoder/*", ["*/bias", "*/dense/kernel"], {"encoder": True, "head": False},
    lambda params: {"encoder": True, "head": False},
])
def test_partition_and_combine_are_inverse(where):
    chosen, rest = nn.partition(PARAMS, where)
    none = jax.tree.map(lambda p: None, PARAMS["head"])
    assert chosen["encoder"] == PARAMS["encoder"]
    assert chosen["head"] == none
    assert rest == {"encoder": {"dense": {"kernel": None, "bias": None}}, "head": PARAMS["head"]}
    for parts in ((chosen, rest), (rest, chosen)):
        chex.assert_trees_all_equal(nn.combine(*parts), PARAMS)


def test_gradient_with_respect_to_a_part_is_that_part_of_the_gradient():
    net, x = nn.sequential(nn.dense(3), nn.tanh(), nn.dense(2)), jnp.ones((5, 7))
    params = net.init(KEY, x)
    loss = lambda params: jnp.sum(net.apply(params, x) ** 2)
    few, rest = nn.partition(params, "dense_0/*")
    part = fbprop.grad(lambda few: loss(nn.combine(few, rest)))(few)
    whole = fbprop.grad(loss)(params)
    chex.assert_trees_all_close(part, nn.partition(whole, "dense_0/*")[0], rtol=1e-6)


def test_freezing_goes_by_the_paths_of_the_summary():
    net, x = nn.sequential(nn.repeated(nn.dense(3), 2), nn.dense(2)), jnp.ones((5, 3))
    params = net.init(KEY, x)
    assert "repeated/dense " in nn.summary(net, x)
    optimizer = optim.freeze(optim.sgd(1.0), "repeated/dense/*")
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    still = jax.tree.map(jnp.zeros_like, params["repeated"])
    chex.assert_trees_all_equal(updates["repeated"], still)
    assert np.any(updates["dense"]["kernel"])


def rows(table):
    return [line.split() for line in table.splitlines()]


def cells(table, path):
    """Parameters and bytes of one row."""
    (row,) = [row for row in rows(table) if row[0] == path]
    return [int(n.replace(",", "")) for n in row[-2:]]


def test_summary_names_shapes_and_sizes():
    block = nn.residual(nn.layer_norm(), nn.attention(2), name="block")
    net = nn.sequential(
        nn.embedding(11, 4), nn.repeated(block, 3), nn.batch_norm(), nn.relu(),
        nn.function(lambda x: x.astype(jnp.bfloat16), "round"),
        nn.dense(7, dtype=jnp.bfloat16, name="head"),
    )
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    table = nn.summary(net, tokens)
    assert [row[0] for row in rows(table)] == [
        "path", "embedding", "repeated/block/layer_norm", "repeated/block/attention/qkv",
        "repeated/block/attention/out", "batch_norm", "relu", "round", "head", "total", "state",
    ]
    assert cells(table, "repeated/block/attention/qkv") == [3 * (4 * 12 + 12), 3 * 60 * 4]
    assert cells(table, "head") == [35, 70]
    assert cells(table, "relu") == [0, 0]
    assert cells(table, "state") == [8, 32]
    params = jax.jit(net.init)(KEY, jnp.zeros((2, 5), jnp.int32))
    nbytes = sum(p.nbytes for p in jax.tree.leaves(params))
    assert cells(table, "total") == [nn.count_parameters(params), nbytes]
    parts = np.array([cells(table, row[0]) for row in rows(table)[1:-2]])
    assert parts.sum(0).tolist() == cells(table, "total")
    assert "float32[2, 5, 12]" in table
    assert len({len(line) for line in table.splitlines()}) == 1


def test_summary_of_one_layer_and_of_parameters_beside_layers():
    x = jnp.ones((2, 3))
    assert rows(nn.summary(nn.dense(5), x))[1:] == [
        ["dense", "float32[2,", "5]", "20", "80"], ["total", "float32[2,", "5]", "20", "80"]]
    inner = nn.dense(3)
    own = nn.Layer(
        lambda key, x: {"dense": inner.init(key, x), "scale": jnp.ones(3)},
        lambda params, x: inner.apply(params["dense"], x) * params["scale"], "own",
    )
    table = nn.summary(nn.sequential(own), x)
    assert cells(table, "own") == [3, 12]
    assert cells(table, "own/dense") == [12, 48]


def test_summary_leaves_no_trace():
    net, x = nn.sequential(nn.dense(3)), jnp.ones((2, 3))
    before = nn.summary(net, x)
    net.apply(net.init(KEY, x), x)
    assert nn.summary(net, x) == before


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_orthogonal_columns_in_any_precision(dtype, tolerance):
    q = nn.initializers.orthogonal(2.0)(KEY, (7, 3), dtype)
    assert q.dtype == dtype
    wide = np.float64(np.asarray(q, np.float32))
    np.testing.assert_allclose(wide.T @ wide, 4 * np.eye(3), atol=4 * tolerance)


ERRORS = {
    "pattern": (ValueError, "got 'decoder/\\*', which matches none",
                lambda: nn.partition(PARAMS, "decoder/*")),
    "twice": (ValueError, "got 'a/b' in 2 of them expected 1",
              lambda: nn.combine({"a": {"b": 1.0}}, {"a": {"b": 2.0}})),
    "summary": (TypeError, r"got \(2, 3\) expected an array or a jax.ShapeDtypeStruct",
                lambda: nn.summary(nn.dense(3), (2, 3))),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
