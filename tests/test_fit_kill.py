"""A run that is killed twenty times ends with the bytes of one that never was."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

ROUNDS = 100

# Only the import of JAX is shared: a child is forked before any backend exists, and starts its own.
NURSERY = f"""
import os, sys
import jax, jax.numpy as jnp
import numpy as np
from fbprop import optim, train


def run(directory):
    x = np.random.RandomState(0).normal(size=(20, 5)).astype(np.float32)
    data = {{"x": x, "y": np.sin(x)}}

    def loss(params, batch, key, model_state):
        keep = jax.random.bernoulli(key, 0.8, batch["x"].shape)
        error = jnp.where(keep, batch["x"], 0) @ params["w"].astype(jnp.float32) - batch["y"]
        mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(error)
        return jnp.mean(error ** 2), {{}}, {{"mean": mean}}

    def metric(params, batch, model_state):
        return jnp.mean((batch["x"] @ params["w"].astype(jnp.float32) - batch["y"]) ** 2)

    optimizer = optim.chain(optim.adam(0.01), optim.average_params(0.9))
    state = train.init({{"w": np.eye(5, dtype=jnp.bfloat16)}}, optimizer, jax.random.key(1),
                       model_state={{"mean": jnp.zeros(())}})
    train.fit(loss, optimizer, state, data, batch_size=5, every=2, epochs={ROUNDS} // 2,
              metric=metric, held_out=data, checkpoints=directory, log=directory + "/log.jsonl")


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stderr = open(line.strip() + ".err", "a")
        try:
            run(line.strip())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """A process that has imported JAX, and forks a training run whenever asked."""

    def __init__(self, cache):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=env, bufsize=1,
        )

    def start(self, directory):
        directory.mkdir(exist_ok=True)
        self.process.stdin.write(f"{directory}\n")
        return int(self.process.stdout.readline())

    def wait(self):
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def nursery(tmp_path):
    nursery = Nursery(tmp_path / "cache")
    yield nursery
    nursery.close()


def newest(directory):
    steps = [name[5:13] for name in os.listdir(directory) if name.startswith("step-")]
    return max(map(int, steps), default=0)


def kill_after(child, directory, rounds, delay):
    """Kills the run when it has written so many checkpoints more, and a moment later."""
    goal = newest(directory) + 2 * rounds
    while newest(directory) < goal:
        os.kill(child, 0)  # fails if it has ended
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)


def contents(directory):
    """All bytes of the checkpoints, and the log without its times."""
    files = {f.name: f.read_bytes() for f in directory.glob("*.safetensors")}
    lines = (directory / "log.jsonl").read_text().splitlines()
    return files, [line.partition('"seconds"')[0] + line.partition('"train"')[2] for line in lines]


def test_twenty_kills_leave_no_trace(nursery, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    nursery.start(whole)
    assert nursery.wait() == 0, (tmp_path / "whole.err").read_text()
    moments = random.Random(0)
    for _ in range(20):
        child = nursery.start(killed)
        # 0 rounds: while it starts. A round takes some 5 ms, most of it for the checkpoint.
        kill_after(child, killed, moments.choice([0, 1, 2, 3, 4]), moments.uniform(0, 0.005))
        assert nursery.wait() == -signal.SIGKILL
    assert 0 < newest(killed) < 2 * ROUNDS
    nursery.start(killed)
    assert nursery.wait() == 0, (tmp_path / "killed.err").read_text()
    files, log = contents(killed)
    assert len(log) == ROUNDS
    assert max(files) == f"step-{2 * ROUNDS:08d}.safetensors"
    assert (files, log) == contents(whole)
