"""Checkpoints in parts: pieces put together for any mesh, and clear about what is wrong.

One process writes here as several do (`tests/test_mesh_kill.py` has two).
"""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fbprop import mesh, optim, train
from fbprop.train import checkpoint

EIGHT = mesh.layout({"a": P("data", "model"), "b": P(("data", "model")), "*": P()})
OPTIMIZER = optim.adam(0.1)


def params():
    a = jnp.arange(96.0).reshape(8, 12)
    return {"a": a, "b": jnp.arange(16).astype(jnp.bfloat16), "c": jnp.array([1j, 2]), "d": 2.5}


def state(where=EIGHT, shape=(4, 2), key=7):
    names = ("data", "model")
    devices = where and jax.make_mesh(shape, names, devices=jax.devices()[:np.prod(shape)])
    return train.init(params(), OPTIMIZER, jax.random.key(key), mesh=devices, layout=where)


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(checkpoint, "in_parts", lambda: True)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_pieces_come_back_under_any_mesh(tmp_path, in_parts):
    saved = state()
    file = train.save(tmp_path / "step-1.safetensors", saved, metadata={"epoch": 3})
    assert train.read_manifest(file)["metadata"] == {"epoch": 3}
    other = mesh.layout({"a": P("model", "data"), "*": P()})
    for like in (state(), state(None), state(other), state(EIGHT, (2, 4)), state(other, (1, 2)),
                 jax.eval_shape(lambda: state(None))):
        back = train.restore(file, like)
        same(back, saved)
        if isinstance(like.step, jax.Array) and like.step.committed:
            assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(
                lambda x: x.sharding, like)
    step = train.step(lambda p, b, k: jnp.sum(p["a"] ** 2) * b, OPTIMIZER)
    step(train.restore(file, state(None)), jnp.float32(1))  # donates what was read


def test_a_whole_file_comes_back_in_parts(tmp_path):
    saved = state(None)
    file = train.save(tmp_path / "step-1.safetensors", saved)
    back = train.restore(file, state())
    same(back, saved)
    assert back.params["a"].sharding.spec == P("data", "model")


def test_saving_again_leaves_the_old_one_until_the_end(tmp_path, in_parts):
    file = tmp_path / "step-1.safetensors"
    directories = set()
    for key in (1, 2, 3):
        train.save(file, state(key=key), keep_last=2)
        same(train.restore(file, state()), state(key=key))
        found = {d.name for d in tmp_path.iterdir() if d.is_dir()}
        assert len(found) == 1  # the other is removed
        directories |= found
    assert directories == {"step-1.parts-a", "step-1.parts-b"}


def test_old_ones_go_with_their_parts(tmp_path, in_parts):
    for step in (1, 2, 3):
        train.save(tmp_path / f"step-{step}.safetensors", state()._replace(step=jnp.int32(step)),
                   keep_last=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "step-2.parts-a", "step-2.safetensors", "step-3.parts-a", "step-3.safetensors"]


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("damage", "match"), [
    (flip, "corrupted"),
    (lambda file: os.truncate(file, file.stat().st_size // 2), "truncated"),
    (lambda file: os.truncate(file, 0), "one whole file, got .* of 0 bytes"),
    (lambda file: file.unlink(), "whole with the files that its index names, got .*No such file"),
    (lambda file: train.save_tensors(file, {"a": jnp.ones(2)}),
     "another checksum than its index says"),
])
def test_a_damaged_part_is_found(tmp_path, in_parts, damage, match):
    for step in (1, 2):
        saved = state()._replace(step=jnp.int32(step))
        file = train.save(tmp_path / f"step-{step}.safetensors", saved)
    damage(tmp_path / "step-2.parts-a" / "0-of-1.safetensors")
    with pytest.raises(train.CheckpointError, match=match):
        train.restore(file, state())
    with pytest.warns(RuntimeWarning, match=f"passed over, got .*{match}"):
        assert train.latest(tmp_path).name == "step-1.safetensors"


def test_a_part_without_a_piece_is_refused(tmp_path, in_parts, monkeypatch):
    own = checkpoint.save_parts.__globals__["_own"]
    monkeypatch.setitem(checkpoint.save_parts.__globals__, "_own", lambda leaf: own(leaf)[1:])
    file = train.save(tmp_path / "step-1.safetensors", state())
    with pytest.raises(train.CheckpointError, match="got 'params/a' .* without the bytes for it"):
        train.restore(file, state())


def test_a_run_on_a_mesh_goes_on_on_one_device(tmp_path, in_parts):
    data = {"x": np.arange(16.0, dtype=np.float32)}

    def loss(params, batch, key):
        return jnp.mean((params["w"] - batch["x"][:, None]) ** 2)

    def run(steps, where, folder):
        devices = None if where is None else jax.make_mesh((8,), ("data",))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return train.fit(loss, optim.adam(0.1), {"w": jnp.zeros(8)}, data, steps=steps,
                             batch_size=8, every=1, checkpoints=folder, mesh=devices, layout=where)

    run(3, mesh.fully_sharded(), tmp_path / "mixed")
    mixed = run(6, None, tmp_path / "mixed")
    alone = run(6, None, tmp_path / "alone")
    np.testing.assert_allclose(mixed.state.params["w"], alone.state.params["w"], rtol=1e-6)
    assert int(mixed.state.step) == 6
