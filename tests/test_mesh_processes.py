"""Two processes of four simulated devices each: as one process, whatever happens to them."""

import json
import re
import socket
import time

import jax
import mesh_runs
import numpy as np
import pytest
from mesh_nursery import Nursery

from fbprop import mesh
from fbprop.mesh.cluster import unsaid
from fbprop.mesh.start import missing


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    nursery = Nursery(tmp_path_factory.mktemp("cache"))
    yield nursery
    nursery.close()


def test_losses_are_those_of_one_process(nursery, tmp_path):
    nursery.run("say_losses", tmp_path / "two")
    alone = {network: mesh_runs.losses(network) for network in ("mlp", "gpt")}
    alone["batches"] = mesh_runs.losses_on_batches()
    for process in (0, 1):
        devices, local, found = json.loads((tmp_path / "two" / f"{process}.json").read_text())
        assert (devices, local) == (8, 4)
        for run, values in found.items():
            np.testing.assert_allclose(values, alone[run.split()[0]], rtol=1e-5, err_msg=run)


@pytest.mark.parametrize("name", ["by_slurm", "by_gke"])
def test_a_cluster_says_who_they_are(nursery, tmp_path, name):
    nursery.run(name, tmp_path / "two")
    alone = mesh_runs.losses("plain")
    for process in (0, 1):
        devices, found = json.loads((tmp_path / "two" / f"{process}.json").read_text())
        assert devices == 8
        np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_one_that_dies_ends_the_other_with_a_sentence(nursery, tmp_path):
    """JAX gives up 4 s, the heartbeat, after the last sign of life, and looks now and then."""
    first, second = nursery.start("wait_for_the_other", tmp_path / "two")
    until = time.monotonic() + 30
    while not (tmp_path / "two" / "1").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert nursery.kill(second) == -9
    killed = time.monotonic()
    assert nursery.wait(first) != 0
    assert time.monotonic() - killed < 20
    said = (tmp_path / "two.0.out").read_text()
    assert "This most likely indicates that another task died" in said


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (("127.0.0.1:9", 2), ValueError, "joins by address, .* expected process too, or none of them"),
    (("127.0.0.1", 2, 0), ValueError, "a host and a port, got '127.0.0.1' expected"),
    (("127.0.0.1:9", 2, 2), ValueError, "numbered from 0, got process=2 expected 0 to 1"),
    (("127.0.0.1:70000", 2, 1), ValueError, "a host and a port, got '127.0.0.1:70000' expected"),
    ((1234, 2, 1), ValueError, "a host and a port, got 1234 expected"),
    (("127.0.0.1:9", "2", 1), ValueError, "counted, got processes='2' expected an integer, 1 or m"),
    (("127.0.0.1:9", 2, -1), ValueError, "counted, got process=-1 expected an integer, 0 or more"),
    ((None, None, None, 0), ValueError, "waited for, got timeout=0 expected seconds, more than 0"),
    ((None, None, None, 1, 0.5), ValueError, "got heartbeat=0.5 expected whole seconds, 1 or more"),
])
def test_mistakes(arguments, error, match):
    with pytest.raises(error, match=match):
        mesh.start(*arguments[:3], **dict(zip(("timeout", "heartbeat"), arguments[3:])))


def test_devices_in_use_and_ports_in_use():
    jax.devices()
    with socket.create_server(("127.0.0.1", 0)) as there:
        address = f"127.0.0.1:{there.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=f"listens at .*, got {address} .* expected a free"):
            mesh.start(address, 1, 0)
    with pytest.raises(RuntimeError, match="got devices in use already; expected mesh.start befor"):
        mesh.start(address, 1, 0)


def test_who_is_missing_is_said_as_far_as_one_can_know():
    with socket.create_server(("127.0.0.1", 0)) as there:
        address = f"127.0.0.1:{there.getsockname()[1]}"
        assert missing(address, 1) == f"some of the others, while process 0 at {address} is there"
        assert missing(address, 0) == missing(None, None) == "some of the others"
    assert missing(address, 1).startswith(f"process 0 at {address} (")


@pytest.mark.parametrize(("name", "match"), [
    ("without_a_cluster", "ValueError: .*got none that JAX knows; expected Slurm"),
    ("without_srun", "ValueError: .*got SLURM_JOB_ID without SLURM_STEP_NODELIST, SLURM_PROCID, "
     "SLURM_LOCALID; expected all of them, which srun sets"),
    ("without_a_number", "ValueError: .*TPU_WORKER_ID=None expected a number"),
    ("without_an_answer",
     r"TimeoutError: .*after 0.2 s from process 0 at 127.0.0.1:9 \(.*refused"),
    ("twice", "RuntimeError: .* got a second mesh.start"),
])
def test_mistakes_in_a_process_of_their_own(nursery, tmp_path, name, match):
    """Who waits in vain goes on waiting until the process ends."""
    said = nursery.said(name, tmp_path / "one")
    assert re.search(match, said), said


@pytest.mark.parametrize(("variable", "match"), [
    ("TPU_WORKER_ID", "got the names of the hosts and no TPU or no libtpu"),
    ("KUBERNETES_SERVICE_HOST", "by the package kubernetes, got none that is installed"),
])
def test_what_a_cluster_did_not_say(variable, match):
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b"} if variable == "TPU_WORKER_ID" else {}
    assert match in unsaid({variable: "0", **hosts})
