"""A run of two processes, killed ten times, ends with the bytes of one that never was."""

import random
import time

import jax
import mesh_runs
import numpy as np
import pytest
from mesh_nursery import Nursery

from fbprop import train


@pytest.fixture
def nursery(tmp_path):
    nursery = Nursery(tmp_path / "cache", devices=2)
    yield nursery
    nursery.close()


def newest(directory):
    steps = [int(file.stem[5:]) for file in directory.glob("step-*.safetensors")]
    return max(steps, default=0)


def contents(directory):
    """All bytes of the checkpoints, and the log without its times."""
    found = directory.rglob("*.safetensors")
    files = {str(file.relative_to(directory)): file.read_bytes() for file in found}
    lines = (directory / "log.jsonl").read_text().splitlines()
    return files, [line.partition('"seconds"')[0] + line.partition('"train"')[2] for line in lines]


def test_ten_kills_leave_no_trace(nursery, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    nursery.run("checkpointed", whole)
    moments = random.Random(0)
    for _ in range(10):
        before = newest(killed)
        children = nursery.start("checkpointed", killed)
        goal, until = before + 2 * moments.choice([0, 1, 2]), time.monotonic() + 60
        while newest(killed) < goal and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02) if goal > before else moments.uniform(0, 1))
        moments.shuffle(children)
        assert nursery.kill(children[0]) == -9
        time.sleep(moments.uniform(0, 0.05))
        assert nursery.kill(children[1]) != 0  # or it has noticed by itself
        assert newest(killed) >= goal
    assert 0 < newest(killed) < 48
    nursery.run("checkpointed", killed)
    files, log = contents(killed)
    assert len(log) == 24
    assert sorted(files)[-1] == "step-00000048.safetensors"
    assert sum("parts" in name for name in files) == 2 * sum("parts" not in name for name in files)
    assert (files, log) == contents(whole)
    restored_elsewhere(whole / "step-00000048.safetensors")


def restored_elsewhere(file):
    """Under another mesh, and on one device."""
    optimizer, params = mesh_runs.optim.adam(0.01), mesh_runs.plain_params
    alone = train.restore(file, train.init(params, optimizer))
    four = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    spread = train.restore(file, train.init(
        params, optimizer, mesh=four, layout=mesh_runs.LAYOUTS["fully sharded"]()))
    assert len(spread.params["dense_0"]["kernel"].sharding.device_set) == 4
    assert spread.params["dense_0"]["kernel"].addressable_shards[0].data.shape == (3, 4)
    same = lambda a, b: np.testing.assert_array_equal(*map(np.asarray, (a, b)))
    for a, b in zip(jax.tree.leaves(alone)[:-1], jax.tree.leaves(spread)[:-1]):
        same(a, b)
    assert int(alone.step) == 48
