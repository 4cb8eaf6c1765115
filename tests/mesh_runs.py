"""Small training runs, the same in one process and in several."""

import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from fbprop import mesh, nn, optim, train

RANDOM = np.random.RandomState(0)
X = RANDOM.normal(size=(40, 12)).astype(np.float32)
VECTORS = {"x": X, "y": np.sin(X[:, :4] * 2)}
TOKENS = RANDOM.randint(0, 16, (40, 9)).astype(np.int32)
MLP = nn.mlp(16, 4, dropout=0.2)
GPT = nn.gpt(16, layers=1, heads=2, features=16, context=8)
LAYOUTS = {"replicated": mesh.replicated, "fully sharded": mesh.fully_sharded}


def mlp_loss(params, batch, key):
    return jnp.mean((MLP.apply(params, batch["x"], key=key, train=True) - batch["y"]) ** 2)


def gpt_loss(params, batch, key):
    return nn.softmax_cross_entropy(GPT.apply(params, batch[:, :-1]), batch[:, 1:])


def plain_loss(params, batch, key):
    """What a process that is started to be killed has compiled in no time; random numbers too."""
    layer, keep = params["dense_0"], jax.random.bernoulli(key, 0.8, batch["x"].shape)
    out = jnp.where(keep, batch["x"], 0) @ layer["kernel"] + layer["bias"]
    return jnp.mean((jnp.sin(out) - batch["y"]) ** 2)


def plain_params():
    return {"dense_0": {"kernel": np.linspace(-1, 1, 48, dtype=np.float32).reshape(12, 4),
                        "bias": np.zeros(4, np.float32)}}


NETWORKS = {
    "plain": (plain_loss, VECTORS, plain_params, optim.adam(0.01)),
    "mlp": (mlp_loss, VECTORS, lambda: MLP.init(jax.random.key(0), X[:1]), optim.adam(0.01)),
    # Of Adam there are 12 updates to compile, a third of its time.
    "gpt": (gpt_loss, TOKENS, lambda: GPT.init(jax.random.key(0), TOKENS[:1, :-1]), optim.sgd(0.1)),
}


def fitted(network, where=None, **options):
    """A run on all devices by a layout; without one, on one device."""
    loss, data, params, optimizer = NETWORKS[network]
    if "held_out" in options:
        options["metric"] = lambda p, b: loss(p, b, jax.random.key(0))
    devices = None if where is None else jax.make_mesh((jax.device_count(),), ("data",))
    return train.fit(
        loss, optimizer, params, options.pop("data", data), every=2, mesh=devices,
        layout=where and LAYOUTS[where](), **options,
    )


def losses(network, where=None):
    """Of a run on arrays."""
    done = fitted(network, where, steps=4, batch_size=16)
    return [row["train"]["loss"] for row in done.history]


def losses_on_batches(where=None):
    """Of a run on batches, of which each process has its own part."""
    share, i = 16 // jax.process_count(), jax.process_index()
    part = lambda x, start: x[start + i * share:][:share]
    batches = [jax.tree.map(lambda x: part(x, start), VECTORS) for start in (0, 16)]
    done = fitted("plain", where, data=batches, steps=4, held_out=batches)
    return [row[part]["loss"] for row in done.history for part in ("train", "held_out")]


def join(port, process, **options):
    mesh.start(f"127.0.0.1:{port}", processes=2, process=process, **options)


def say_losses(directory, port, process):
    join(port, process)
    found = {f"{n} {where}": losses(n, where) for n in ("mlp", "gpt") for where in LAYOUTS}
    found["batches"] = losses_on_batches("fully sharded")
    with open(f"{directory}/{process}.json", "w") as file:
        json.dump([jax.device_count(), len(jax.local_devices()), found], file)


def checkpointed(directory, port, process):
    """A fully sharded run of 24 rounds that goes on from its last checkpoint."""
    join(port, process)
    fitted("plain", "fully sharded", steps=48, batch_size=16, checkpoints=directory,
           log=f"{directory}/log.jsonl", progress=False)


def wait_for_the_other(directory, port, process):
    """The first waits for a sum that the second does not take part in."""
    join(port, process, heartbeat=4)
    fitted("mlp", "replicated", steps=2, batch_size=16)
    pathlib.Path(directory, str(process)).touch()
    if process == 1:
        time.sleep(60)
    fitted("mlp", "replicated", steps=2, batch_size=16)


def by_slurm(directory, port, process):
    """With the variables of ``srun --ntasks=2`` on one node, and the job that has this port."""
    os.environ.update({
        "SLURM_JOB_ID": str(4096 + port - 61440), "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2", "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process),
        "SLURM_STEP_NUM_NODES": "1",
    })
    joined(directory, process)


def by_gke(directory, port, process):
    """With the variables of a JobSet of one slice; its port is given, so as to be free.

    That there is a TPU, which JAX looks for when it is imported, is taken for granted.
    """
    from jax._src.clusters import cloud_tpu_cluster

    cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    os.environ.update({
        "TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(process),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0", "TPU_SKIP_MDS_QUERY": "1", "JAX_COORDINATOR_PORT": str(port),
    })
    joined(directory, process)


def joined(directory, process):
    mesh.start()
    assert (jax.process_index(), jax.process_count()) == (process, 2)
    with open(f"{directory}/{process}.json", "w") as file:
        json.dump([len(jax.devices()), losses("plain", "fully sharded")], file)


def without_a_cluster(directory, port, process):
    mesh.start()


def without_a_number(directory, port, process):
    """On GKE, of TPUs."""
    from jax._src.clusters import cloud_tpu_cluster

    cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    os.environ.update({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1",
                       "MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1",
                       "MEGASCALE_SLICE_ID": "0"})
    mesh.start()


def without_srun(directory, port, process):
    os.environ.update({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"})
    mesh.start()


def without_an_answer(directory, port, process):
    mesh.start("127.0.0.1:9", 2, 1, timeout=0.2)


def twice(directory, port, process):
    for _ in range(2):
        mesh.start(f"127.0.0.1:{port}", 1, 0)
