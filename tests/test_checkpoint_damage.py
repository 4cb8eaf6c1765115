"""Damaged checkpoints beside sound ones: a run goes on from the newest sound one, and says so."""

import json
import os
import pathlib

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import optim, train
from fbprop.data import tensorfile

DATA = {"x": np.arange(8, dtype=np.float32)}


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def as_directory(file):
    file.unlink()
    file.mkdir()
    (file / "inside").write_text("kept")


def as_dead_link(file):
    file.unlink()
    file.symlink_to(file.parent / "nothing")


def with_manifest(file, manifest):
    contents = tensorfile.read(file)
    tensors = {name: contents.array(name) for name in contents.table}
    tensorfile.write(file, tensors, {"fbprop": manifest})


DAMAGE = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a bit of the length": lambda file: flip(file, 0),
    "a bit of the header": lambda file: flip(file, 120),
    "a bit of an array": lambda file: flip(file, -1),
    "another file": lambda file: file.write_bytes(b"\x80\x04a pickle, perhaps"),
    "a directory": as_directory,
    "a dead link": as_dead_link,
    "a manifest that is no JSON": lambda file: with_manifest(file, "{"),
    "a manifest that is a list": lambda file: with_manifest(file, "[1]"),
    "a manifest without leaves": lambda file: with_manifest(
        file, json.dumps({"format": 1, "step": 3})
    ),
}


def write_three(folder):
    """Checkpoints of steps 1 to 3, the parameter being the step."""
    state = train.init({"w": jnp.zeros(3)}, optim.sgd(0.1))
    for step in (1, 2, 3):
        stepped = state._replace(params={"w": jnp.full(3, step)}, step=jnp.int32(step))
        train.save(folder / f"step-{step:08d}.safetensors", stepped)
    (folder / ".step-00000004.safetensors.partial").write_bytes(b"half")
    (folder / "notes.txt").write_text("no checkpoint")
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", DAMAGE)
def test_the_newest_sound_one_is_found_and_the_damaged_one_named(tmp_path, name):
    for i in range(3):
        folder = tmp_path / str(i)
        files = write_three(folder := _made(folder))
        DAMAGE[name](files[i])
        with pytest.warns(RuntimeWarning, match=rf"passed over, got .*{files[i].name}") as caught:
            found = train.latest(folder)
        assert len(caught) == 1
        assert found == files[1 if i == 2 else 2]
    for file in files[:2]:
        DAMAGE[name](file)
    with pytest.raises(train.CheckpointError, match="got only damaged ones") as error:
        train.latest(folder)
    assert all(str(file) in str(error.value) for file in files)


def _made(folder):
    folder.mkdir()
    return folder


def loss(params, batch, key):
    return jnp.mean((batch["x"] - params["w"]) ** 2)


def run(folder, epochs, **options):
    return train.fit(loss, optim.adam(0.1), {"w": jnp.zeros(())}, DATA, epochs=epochs, batch_size=2,
                     checkpoints=folder, **options)


def test_a_run_goes_back_to_the_newest_sound_one_and_ends_the_same(tmp_path):
    whole = run(tmp_path / "whole", 5)
    for name, damage in (("old", [4]), ("new", [12]), ("both", [4, 12])):
        folder = tmp_path / name
        run(folder, 3)
        for step in damage:
            os.truncate(folder / f"step-{step:08d}.safetensors", 100)
        with pytest.warns(RuntimeWarning, match=f"step-{damage[0]:08d}.* newest sound one is"):
            resumed = run(folder, 5)
        chex.assert_trees_all_equal(resumed.state.params, whole.state.params)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        os.truncate(file, 100)
    with pytest.raises(train.CheckpointError, match="got only damaged ones"):
        run(folder, 5)


def test_saving_passes_over_damaged_ones(tmp_path):
    """They are neither counted nor removed, and writing goes on."""
    files = write_three(tmp_path)
    as_directory(files[0])
    os.truncate(files[1], 10)
    state = train.init({"w": jnp.zeros(3)}, optim.sgd(0.1))._replace(step=jnp.int32(4))
    train.save(tmp_path / "step-00000004.safetensors", state, keep_last=1)
    assert [f.name[5:13] for f in sorted(tmp_path.glob("*.safetensors"))] == [
        "00000001", "00000002", "00000004"
    ]
    with pytest.raises(IsADirectoryError, match="got the directory .*00001.* expected a path"):
        train.save(files[0], state)


def test_a_best_round_that_is_lost_is_said(tmp_path):
    def metric(params, batch):
        return params["w"]  # less is better: the first round is the best

    options = {"metric": metric, "held_out": DATA, "keep_last": 1}
    done = run(tmp_path, 3, **options)
    assert int(done.best.step) == 4
    flip(tmp_path / "step-00000004.safetensors", -1)
    with pytest.warns(RuntimeWarning) as caught:
        again = run(tmp_path, 3, **options)
    assert any("Fit.best is the last state instead" in str(w.message) for w in caught)
    assert int(again.best.step) == 12


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        train.save(tmp_path / "a.safetensors", {"w": jnp.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_lists_other_arrays_is_refused(tmp_path):
    tree = {"w": jnp.ones(2), "x": jnp.ones(2)}
    file = train.save(tmp_path / "a.safetensors", tree)
    manifest = train.read_manifest(file)
    manifest["leaves"][0] |= {"path": "v"}
    with_manifest(file, json.dumps(manifest))
    with pytest.raises(train.CheckpointError, match="lists, got 'v' of float32.2. in .* without"):
        train.restore(file, {"v": jnp.ones(2), "x": jnp.ones(2)})
    manifest["leaves"][0] |= {"path": "w", "shape": [3]}
    with_manifest(file, json.dumps(manifest))
    with pytest.raises(train.CheckpointError, match="lists, got 'w' of float32.3. in"):
        train.restore(file, {"w": jnp.ones(3), "x": jnp.ones(2)})


def test_places_where_no_checkpoints_can_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError, match="got the file .* expected a directory"):
        train.latest(tmp_path / "file")
    with pytest.raises(OSError, match="a directory that can be written to, got .*file"):
        run(pathlib.Path(tmp_path / "file"), 1)
