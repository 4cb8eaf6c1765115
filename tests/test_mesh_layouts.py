"""Layouts: what lies where, what follows it, and what is refused."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from fbprop import mesh, nn, optim
from fbprop.mesh.follow import following
from fbprop.mesh.layouts import automatic

BOTH = AbstractMesh((4, 2), ("data", "model"))
EIGHT = AbstractMesh((8,), ("data",))


def shapes(network, shape, dtype="float32"):
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), x))



def plain(specs):
    """{path: spec} of what is split."""
    found = jax.tree.leaves_with_path(specs, is_leaf=lambda s: isinstance(s, P))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): tuple(s) for path, s in found if any(s)}


ONE = {"encoder": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}, "scale": jnp.ones(())}


def test_the_first_pattern_counts():
    where = mesh.layout({"*kernel": P("data", "model"), "encoder/*": P("model"), "*": P()})
    assert plain(where.specs(BOTH, ONE)) == {
        "encoder/kernel": ("data", "model"), "encoder/bias": ("model",)
    }
    shardings = where.shardings(BOTH, ONE)
    assert shardings["encoder"]["kernel"].shard_shape((8, 6)) == (2, 3)


@pytest.mark.parametrize(("patterns", "match"), [
    ({"*kernel": P(None, "data"), "*": P()},
     r"equal part, got parameter 'encoder/kernel' of float32\[8,6\], whose dimension 1 axis 'data' "
     "of 4 devices does not divide; expected a multiple of 4"),
    ({"*kernel": P(("data", "model"), None), "*bias": P(("data", "model")), "*": P()},
     r"'encoder/bias' of float32\[6\], whose dimension 0 axis \('data', 'model'\) of 8 devices"),
    ({"*kernel": P("rows"), "*": P()},
     r"axes of the mesh, got 'rows' for parameter 'encoder/kernel' .* expected one of \('data'"),
    ({"scale": P("data"), "*": P()},
     "at most one entry per dimension, got .*'data'.* for parameter 'scale'"),
    ({"*kernel": P(), "decoder/*": P(), "*": P()}, "matches a parameter, got 'decoder/.*', .* one"),
    ({"encoder/*": P()}, "has a place, got 'scale', which no pattern matches; expected a match"),
    ({"*kernel": P("model", "model"), "*": P()},
     "splits one dimension of a parameter, got .* for parameter 'encoder/kernel'"),
])
def test_what_does_not_fit_is_refused(patterns, match):
    def refused():
        mesh.layout(patterns).specs(BOTH, ONE)

    with pytest.raises(ValueError, match=match):
        refused()


@pytest.mark.parametrize(("mistake", "match"), [
    (lambda: mesh.layout({"*": P(P.UNCONSTRAINED)}).specs(BOTH, ONE), "axis of a mesh is a name, "
     r"got UNCONSTRAINED for parameter 'encoder/bias' of float32\[6\] expected a string"),
    (lambda: mesh.fully_sharded(3).specs(BOTH, ONE), "got 3 for a fully sharded layout expected"),
    (lambda: mesh.replicated(batch=3).batch_axes(BOTH), "got 3 for the batch expected a string"),
    (lambda: mesh.fully_sharded(within=BOTH), "a layout's say, got .* expected .*, or None"),
    (lambda: mesh.show(ONE, BOTH, mesh.replicated()), "layout's say, .*parallel returns[.]"),
    (lambda: mesh.replicated().specs(8, ONE), "for a mesh, got mesh=8 expected a jax.sharding.M"),
    (lambda: mesh.feed(jnp.ones(8), None), "for a mesh, got mesh=None expected"),
    (lambda: mesh.feed(jnp.ones(8), BOTH, P()), r"a layout's say, got P\(\) expected"),
])
def test_what_is_no_axis_mesh_or_layout_is_refused(mistake, match):
    with pytest.raises(TypeError, match=match):
        mistake()


@pytest.mark.parametrize("patterns", [{}, {"*": "data"}, [("*", P())], {3: P()}])
def test_a_layout_is_a_dict_of_specs(patterns):
    with pytest.raises(TypeError, match="a dict from patterns to specs, got .* expected e.g."):
        mesh.layout(patterns)


def test_the_batch_is_split_over_axes_that_the_mesh_has():
    assert mesh.replicated().batch_axes(BOTH) == ("data",)
    assert mesh.replicated().batch_axes(AbstractMesh((8,), ("model",))) == ()
    assert mesh.replicated(batch=("data", "model")).batch_axes(BOTH) == ("data", "model")
    assert mesh.replicated(batch=None).batch_axes(BOTH) == ()
    assert mesh.fully_sharded("model").batch_axes(BOTH) == ("model",)
    with pytest.raises(ValueError, match=r"got 'rows' for the batch expected one of \('data',\)"):
        mesh.replicated(batch="rows").batch_axes(EIGHT)


def test_fully_sharded_splits_the_largest_dimension_that_divides():
    params = {"a": jnp.ones((16, 24)), "b": jnp.ones((9, 16, 3)), "c": jnp.ones(7)}
    assert plain(mesh.fully_sharded().specs(EIGHT, params)) == {
        "a": (None, "data"), "b": (None, "data")
    }
    both = mesh.fully_sharded(("data", "model"))
    assert plain(both.specs(BOTH, {"a": params["a"]})) == {"a": (None, ("data", "model"))}
    with pytest.raises(ValueError, match="got 'rows' for a fully sharded layout expected one of"):
        mesh.fully_sharded("rows").specs(EIGHT, params)


GPT = {
    "embedding/embedding": ("model",),
    **{f"block_{i}/attention/attention/{name}": spec for i in (0, 1) for name, spec in {
        "qkv/kernel": (None, "model"), "qkv/bias": ("model",), "out/kernel": ("model",)}.items()},
    **{f"block_{i}/mlp/{name}": spec for i in (0, 1) for name, spec in {
        "dense_0/kernel": (None, "model"), "dense_0/bias": ("model",),
        "dense_1/kernel": ("model",)}.items()},
}


def test_tensor_parallel_layouts_split_kernels_by_turns():
    sizes = {"layers": 2, "heads": 2, "features": 8, "context": 5}
    net = nn.gpt(10, **sizes)
    specs = mesh.tensor_parallel(net).specs(BOTH, shapes(net, (1, 5), "int32"))
    assert plain(specs) == GPT
    stacked = nn.gpt(9, **sizes, scan=True, tie=False)
    specs = plain(mesh.tensor_parallel(stacked).specs(BOTH, shapes(stacked, (1, 5), "int32")))
    assert specs["repeated/block/mlp/dense_0/kernel"] == (None, None, "model")
    assert specs["repeated/block/mlp/dense_1/kernel"] == (None, "model")
    assert specs["embedding/embedding"] == (None, "model")  # 9 tokens
    assert "head/kernel" not in specs


def test_tensor_parallel_layouts_of_other_networks():
    net = nn.mlp(6, 8, 12, 4, 3)
    assert plain(mesh.tensor_parallel(net).specs(BOTH, shapes(net, (1, 5)))) == {
        "dense_0/kernel": (None, "model"), "dense_0/bias": ("model",), "dense_1/kernel": ("model",),
        "dense_2/kernel": (None, "model"), "dense_2/bias": ("model",), "dense_3/kernel": ("model",),
    }
    net = nn.convnet(10, channels=(4, 6), convolutions=2, norm=nn.batch_norm)
    specs = plain(mesh.tensor_parallel(net).specs(BOTH, shapes(net, (1, 8, 8, 1))))
    assert specs == {
        "conv_0/kernel": (None, None, None, "model"), "conv_1/kernel": (None, None, "model"),
        "conv_2/kernel": (None, None, None, "model"), "conv_3/kernel": (None, None, "model"),
        "batch_norm_0/scale": ("model",), "batch_norm_0/bias": ("model",),
        "batch_norm_2/scale": ("model",), "batch_norm_2/bias": ("model",),
        "head/kernel": (None, "model"), "head/bias": ("model",),
    }
    net = nn.lstm_lm(10, features=4)
    specs = plain(mesh.tensor_parallel(net).specs(BOTH, shapes(net, (1, 5), "int32")))
    assert not any("lstm/" in name for name in specs)
    with pytest.raises(TypeError, match="got dict expected a fbprop.nn.Layer"):
        mesh.tensor_parallel({})
    with pytest.raises(ValueError, match="got 'rows' for a tensor-parallel layout expected one"):
        mesh.tensor_parallel(net, "rows").specs(BOTH, shapes(net, (1, 5), "int32"))


def test_fully_sharded_within_tensor_parallel():
    net = nn.mlp(8, 4)
    where = mesh.fully_sharded("data", within=mesh.tensor_parallel(net))
    assert plain(where.specs(BOTH, shapes(net, (1, 12)))) == {
        "dense_0/kernel": ("data", "model"), "dense_0/bias": ("model",),
        "dense_1/kernel": ("model", "data"), "dense_1/bias": ("data",),
    }


def test_an_optimisers_state_follows_its_parameters():
    params = {"kernel": jax.ShapeDtypeStruct((256, 128), "float32"),
              "bias": jax.ShapeDtypeStruct((6,), "float32")}
    where = mesh.layout({"kernel": P("data", "model"), "*": P()})
    optimizer = optim.chain(
        optim.by_path({"kernel": optim.adafactor(0.1), "bias": optim.adam(0.1)}),
        optim.average_params(0.9),
    )
    state = jax.eval_shape(optimizer.init, params)
    specs = jax.tree.map(lambda s: s.spec, following(where, BOTH, params, state))
    found = [(x.shape, tuple(s)) for x, s in zip(
        jax.tree.leaves(state), jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)))]
    assert {place for place in found if any(place[1])} == {
        ((256,), ("data",)), ((128,), ("model",)), ((256, 128), ("data", "model"))
    }
    assert [shape for shape, spec in found if not any(spec)].count((6,)) == 3


def test_axes_are_made_automatic():
    for explicit in (jax.make_mesh((4, 2), ("a", "b")), AbstractMesh((4, 2), ("a", "b"))):
        got = automatic(explicit)
        assert set(got.axis_types) == {AxisType.Auto}
        assert dict(got.shape) == {"a": 4, "b": 2}


def test_bytes_of_a_device_are_shown():
    table = mesh.show(ONE, mesh.layout({"*kernel": P("data", "model"), "*": P()}), BOTH)
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["encoder/bias", "float32[6]", "float32[6]", "-", "24"],
        ["encoder/kernel", "float32[8,", "6]", "float32[2,", "3]", "data,", "model", "24"],
        ["scale", "float32[]", "float32[]", "-", "4"],
        ["total", "of", "mesh", "data=4,", "model=2", "52"],
    ]
    numbers = mesh.show({"a": 1.0, "b": 2}, mesh.fully_sharded(), BOTH)
    assert ["b", "int32[]", "int32[]", "-", "4"] in [line.split() for line in numbers.splitlines()]
