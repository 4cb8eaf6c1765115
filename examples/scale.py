"""The language model on any mesh: the same lines train on one CPU, eight GPUs, or many hosts.

    python examples/scale.py                                     # every device that is there
    python examples/scale.py --mesh data=4,model=2 --devices 8   # eight simulated CPUs
    python examples/scale.py --mesh data=16 --join 10.0.0.1:1234,2,0   # of two hosts, on the first

The batch is split over "data"; so is every parameter and what the optimiser keeps of it (fully
sharded), unless --whole leaves them whole; "model" shares out each layer's products.
"""

import argparse
import importlib.util
import math
import os
import time


def choose_layout(axes, network, whole):
    """Where the parameters lie, by the axes that there are."""
    tensor = mesh.tensor_parallel(network) if "model" in axes else None
    if whole or "data" not in axes:
        return tensor or mesh.replicated()
    return mesh.fully_sharded("data", within=tensor)


def make_network(options, vocabulary):
    return nn.gpt(vocabulary, layers=options.layers, heads=options.heads, context=options.context,
                  features=options.features, scan=True)


def make_loss(network):
    def loss(params, tokens, key):
        """Each character guessed from those before it."""
        return nn.softmax_cross_entropy(network.apply(params, tokens[:, :-1]), tokens[:, 1:])

    return loss


def windows(context, limit=None):
    """Characters as integers, [windows, context + 1], and how many different ones there are."""
    different, tokens = np.unique(list(data.shakespeare()[:limit]), return_inverse=True)
    view = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int32), context + 1)
    return view[:: context // 2], len(different)


def bytes_of(state):
    """Of parameters and optimiser's state, on this process's first device, and whole."""
    leaves = jax.tree.leaves((state.params, state.opt_state))
    return sum(x.addressable_shards[0].data.nbytes for x in leaves), sum(x.nbytes for x in leaves)


def plot(history, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    panel.plot([row["step"] for row in history], [row["train"]["loss"] for row in history])
    panel.set(xlabel="step", ylabel="nats per character")
    figure.savefig(file, dpi=120)


def parse_mesh(text):
    """``"data=4,model=2"`` as a dict."""
    try:
        axes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        axes = {}
    if not axes or not axes.keys() <= {"data", "model"} or min(axes.values()) < 1:
        raise argparse.ArgumentTypeError(
            f"a mesh has axes data, model or both, got {text!r} expected e.g. data=4,model=2")
    return axes


def parse_join(text):
    """``"10.0.0.1:1234,2,0"`` as what `mesh.start` takes, ``"auto"`` as nothing."""
    try:
        coordinator, processes, process = text.split(",")
        return coordinator, int(processes), int(process)
    except ValueError:
        if text == "auto":
            return ()
    raise argparse.ArgumentTypeError(
        f"a process joins by address, how many there are, and its number, got {text!r} expected "
        "e.g. 10.0.0.1:1234,2,0, or auto")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mesh", type=parse_mesh, help="axes and sizes: data=4,model=2; default: "
                        "all devices along data")
    parser.add_argument("--devices", type=int, help="simulate so many CPUs")
    parser.add_argument("--join", type=parse_join, metavar="HOST:PORT,PROCESSES,PROCESS",
                        help="one of several processes; 'auto' under Slurm, on GKE and Cloud TPUs")
    parser.add_argument("--whole", action="store_true", help="parameters whole along data")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--checkpoints", metavar="DIRECTORY", help="save there, and go on from it")
    parser.add_argument("--smoke", action="store_true", help="a small model, 6 steps")
    parser.add_argument("--plot", metavar="FILE", help="draw the curve (needs matplotlib)")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib, which is missing: pip install matplotlib")
    if options.smoke:
        options.layers, options.features, options.context, options.steps = 1, 32, 32, 6
        options.batch = min(options.batch, 16)
    return options


def main(options):
    if options.join is not None:
        mesh.start(*options.join)
    axes = options.mesh or {"data": jax.device_count()}
    if (size := math.prod(axes.values())) > jax.device_count():
        raise SystemExit(f"--mesh takes {size} devices, got {jax.device_count()}: --devices {size} "
                         "simulates them.")
    devices = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:size])
    examples, vocabulary = windows(options.context, 30_000 if options.smoke else None)
    network = make_network(options, vocabulary)
    layout = choose_layout(axes, network, options.whole)
    optimizer = optim.adam(3e-4)
    tokens = jax.ShapeDtypeStruct((1, options.context), "int32")
    make = lambda: network.init(jax.random.key(0), tokens)
    state = train.init(make, optimizer, mesh=devices, layout=layout)
    first = jax.process_index() == 0
    if first:
        print(mesh.show(jax.eval_shape(make), layout, devices))
        part, whole = bytes_of(state)
        print(f"parameters and optimiser's state: {part:,} bytes on a device, of {whole:,}; "
              f"{jax.device_count()} x {jax.devices()[0].device_kind}", flush=True)
    start = time.perf_counter()
    done = train.fit(
        make_loss(network), optimizer, state, examples, steps=options.steps, mesh=devices,
        batch_size=options.batch, every=max(1, -(-options.steps // 3)), layout=layout,
        compute_dtype=jax.numpy.bfloat16 if options.bfloat16 else None,
        checkpoints=options.checkpoints,
    )
    if not first:
        return
    for row in done.history:
        print(f"step {row['step']:5d}  {row['train']['loss']:.4f} nats per character  "
              f"{row['seconds']:.1f} s")
    last = done.history[-1]
    steps = last["step"] - (done.history[-2]["step"] if len(done.history) > 1 else 0)
    rate = steps * options.batch * options.context / max(last["seconds"], 1e-3)
    print(f"{rate:,.0f} tokens/s in the last round, after {time.perf_counter() - start:.0f} s")
    if options.plot:
        plot(done.history, options.plot)


if __name__ == "__main__":
    options = parse_options()
    if options.devices:
        flag = f"--xla_force_host_platform_device_count={options.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the partitioner's remarks

import jax  # noqa: E402  (the number of devices is settled before)
import numpy as np  # noqa: E402

from fbprop import data, mesh, nn, optim, train  # noqa: E402

if __name__ == "__main__":
    main(options)
