"""Checkpoints: bit for bit what was saved, whole or not at all, and clear about what is wrong."""

import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim, train
from fbprop.data import tensorfile

DTYPES = ("bool", "int8", "uint8", "int16", "int32", "uint32", "float16", "bfloat16", "float32",
          "complex64", "float8_e4m3fn", "float8_e5m2", "int4")


def make_state(width=3, optimizer=None, key=None):
    params = {"w": jnp.arange(5.0 * width).reshape(5, width), "b": jnp.ones(width, jnp.bfloat16)}
    return train.init(params, optimizer or optim.adam(0.1), key)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("key", [
    jax.random.key(7), jax.random.key(7, impl="rbg"), jax.random.PRNGKey(7),
    jax.random.split(jax.random.key(7), 3),
])
def test_a_state_comes_back_bit_for_bit(tmp_path, key):
    state = make_state(key=key)
    file = train.save(tmp_path / "new" / "a.safetensors", state)
    for like in (state, make_state(key=key), jax.eval_shape(lambda: state)):
        same_bits(train.restore(file, like), state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_every_dtype_comes_back(tmp_path, dtype, shape):
    x = np.arange(np.prod(shape)).reshape(shape) % 5
    tree = {"odd": jnp.ones(3, jnp.int8), "x": jnp.asarray(x.astype(jnp.dtype(dtype)))}
    file = train.save(tmp_path / "a.safetensors", tree)
    same_bits(train.restore(file, tree), tree)


def test_not_a_number_and_numpy_and_python_leaves_come_back(tmp_path, x64):
    tree = [np.array([np.nan, -0.0, np.inf]), 1.5, 3, jnp.float64(np.pi), np.float32(2)]
    back = train.restore(train.save(tmp_path / "a.safetensors", tree), tree)
    assert [type(x) for x in back[:4:2]] == [np.ndarray, int]
    assert back[0].tobytes() == tree[0].tobytes()
    assert back[1:3] == [1.5, 3]
    assert (float(back[3]), back[3].dtype) == (np.pi, jnp.float64)


def test_a_restored_state_trains_on_and_is_donated(tmp_path):
    optimizer = optim.adam(0.1)
    step = train.step(lambda p, b, k: jnp.sum(p["w"] ** 2) * b, optimizer)
    state = make_state(optimizer=optimizer)
    file = train.save(tmp_path / "a.safetensors", state)
    restored = train.restore(file, state)
    after, _ = step(state, jnp.float32(1))
    again, _ = step(restored, jnp.float32(1))
    same_bits(again, after)
    assert all(x.is_deleted() for x in jax.tree.leaves(restored.params))


def test_placement_follows_like(tmp_path):
    devices = jax.devices()
    mesh = jax.make_mesh((2,), ("x",), devices=devices[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    like = [jax.device_put(jnp.arange(6), rows), jax.device_put(jnp.ones(2), devices[3])]
    file = train.save(tmp_path / "a.safetensors", like)
    back = train.restore(file, like)
    assert [x.sharding for x in back] == [x.sharding for x in like]
    same_bits(back, like)


def test_manifest_says_what_is_inside(tmp_path):
    state = make_state()._replace(step=jnp.int32(11))
    file = train.save(tmp_path / "a.safetensors", state, metadata={"position": [2, 5]})
    manifest = train.read_manifest(file)
    assert (manifest["format"], manifest["step"]) == (1, 11)
    assert manifest["metadata"] == {"position": [2, 5]}
    assert manifest["versions"]["jax"] == jax.__version__
    leaves = {e["path"]: (e["shape"], e["dtype"]) for e in manifest["leaves"]}
    assert leaves["params/b"] == ([3], "bfloat16")
    assert leaves["key"] == ([], "key<fry>")
    assert manifest["keys"] == {"key": "threefry2x32"}


def test_the_same_state_is_the_same_file(tmp_path):
    files = [train.save(tmp_path / f"{name}.safetensors", make_state()) for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_last_ones_and_named_ones_are_kept(tmp_path):
    state = make_state()
    other = train.save(tmp_path / "other-1.safetensors", state)
    for step in (9, 10, 11, 12):
        train.save(tmp_path / f"step-{step}.safetensors", state._replace(step=jnp.int32(step)),
                   keep_last=2, keep=[tmp_path / "step-9.safetensors"])
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["other-1.safetensors", "step-11.safetensors", "step-12.safetensors",
                     "step-9.safetensors"]
    assert train.latest(tmp_path).name == "step-12.safetensors"
    assert other.exists()


def test_latest_passes_over_what_is_no_checkpoint(tmp_path):
    assert train.latest(tmp_path / "none") is None
    train.save_tensors(tmp_path / "model.safetensors", {"w": jnp.ones(2)})
    (tmp_path / ".step-3.safetensors.partial").write_bytes(b"half")
    assert train.latest(tmp_path) is None
    file = train.save(tmp_path / "step-0.safetensors", make_state())
    assert train.latest(tmp_path) == file


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = train.save(tmp_path / "a.safetensors", make_state())
    before = file.read_bytes()

    def broken(source, target):
        assert os.path.getsize(source) > 0
        raise OSError("no power")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no power"):
        train.save(file, make_state(width=7))
    assert file.read_bytes() == before


def test_no_byte_can_change_unnoticed(tmp_path):
    state = [jnp.arange(3.0), jax.random.key(1)]
    file = train.save(tmp_path / "a.safetensors", state)
    content = file.read_bytes()
    for place in range(len(content)):
        spoilt = bytearray(content)
        spoilt[place] ^= 1
        file.write_bytes(spoilt)
        with pytest.raises(train.CheckpointError, match=r"(got|in) .*a\.safetensors"):
            train.restore(file, state)


def test_no_length_but_the_whole_is_accepted(tmp_path):
    state = [jnp.arange(3.0)]
    file = train.save(tmp_path / "a.safetensors", state)
    content = file.read_bytes()
    for size in (0, 3, 8, 20, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(train.CheckpointError, match="truncated"):
            train.restore(file, state)
    file.write_bytes(content + b"\0")
    with pytest.raises(train.CheckpointError, match="or was written to"):
        train.restore(file, state)


def other_tree(width=3, **more):
    return {"b": jnp.ones(width), "w": [jnp.ones((2, width))], **more}


MISFITS = {
    "shape": (other_tree(5), r"got 'b' of float32\[3\] in .* expected 'b' of float32\[5\]"),
    "dtype": (
        jax.tree.map(lambda x: x.astype(jnp.float16), other_tree()),
        r"got 'b' of float32\[3\] in .* expected 'b' of float16\[3\]",
    ),
    "extra in the file": ({"b": jnp.ones(3)}, r"got 'w/0' of .* expected no further leaf"),
    "extra in the model": (
        other_tree(z=jnp.int32(0)), r"got no further leaf in .* expected 'z' of int32\[\]"
    ),
    "other name": (
        {"b": jnp.ones(3), "v": [jnp.ones((2, 3))]},
        r"got 'w/0' of float32\[2,3\] in .* expected 'v/0' of float32\[2,3\]",
    ),
    "other kind of key": (
        {"b": jax.random.key(0)}, r"got 'b' of float32\[3\] in .* expected 'b' of key<fry>\[\]"
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_another_models_file_names_the_first_leaf_that_differs(tmp_path, name):
    like, text = MISFITS[name]
    file = train.save(tmp_path / "a.safetensors", other_tree())
    with pytest.raises(train.CheckpointError, match=text):
        train.restore(file, like)


def rewrite_manifest(file, **changes):
    """The file with another manifest, well-formed otherwise."""
    manifest = train.read_manifest(file) | changes
    contents = tensorfile.read(file)
    tensors = {name: contents.array(name) for name in contents.table}
    tensorfile.write(file, tensors, {"fbprop": json.dumps(manifest)})


def test_a_newer_file_is_refused(tmp_path):
    state = make_state()
    file = train.save(tmp_path / "a.safetensors", state)
    rewrite_manifest(file, format=3, versions={"fbprop": "7.1"})
    with pytest.raises(train.CheckpointError, match=r"format 3 expected at most 2: .* 7\.1"):
        train.restore(file, state)


def test_other_files_are_told_apart(tmp_path):
    file = tmp_path / "a.safetensors"
    train.save_tensors(file, {"w": jnp.ones(2)})
    with pytest.raises(train.CheckpointError, match=r"has a manifest, got .* without"):
        train.restore(file, {"w": jnp.ones(2)})
    file.write_bytes(b"\x80\x04this is a pickle, perhaps")
    with pytest.raises(train.CheckpointError, match="another kind of file"):
        train.restore(file, {"w": jnp.ones(2)})
    with pytest.raises(FileNotFoundError, match="nothing"):
        train.restore(tmp_path / "nothing", {})


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="got keep_last=0 expected >= 1"):
        train.save(tmp_path / "a.safetensors", make_state(), keep_last=0)
    with pytest.raises(ValueError, match="two leaves whose paths are spelt alike"):
        train.save(tmp_path / "a.safetensors", {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    with pytest.raises(TypeError, match="not JSON serializable"):
        train.save(tmp_path / "a.safetensors", make_state(), metadata={"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_other_programs_are_read(tmp_path):
    header = json.dumps({
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "a.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [4, 12]},
    }).encode()
    raw = jnp.array([1, 2], jnp.bfloat16).tobytes() + np.array([3, 4], np.float32).tobytes()
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw)
    got = train.load_tensors(file)
    chex.assert_trees_all_equal(got["a.weight"], np.array([[3, 4]], np.float32))
    assert got["b"].dtype == jnp.bfloat16
    assert got["b"].tolist() == [1, 2]


@pytest.mark.parametrize("change", [{"dtype": "F99"}, {"shape": [3]}, {"data_offsets": [-4, 4]},
                                    {"data_offsets": None}, {"shape": "x"}])
def test_a_header_that_lies_about_its_arrays_is_refused(tmp_path, change):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change
    header = json.dumps({"w": entry}).encode()
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(train.CheckpointError, match="a dtype, shape and place for each array"):
        train.load_tensors(file)
