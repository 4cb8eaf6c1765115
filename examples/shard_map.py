"""A network in stages, and attention in a ring: two ways to share out one loss by hand.

    python examples/shard_map.py --devices 8

`jax.shard_map` says what each device does and sends; `fbprop.value_and_grad` differentiates it as
it stands. Both losses and their gradients are compared with those of one device, and so is the
memory that a device needs.
"""

import argparse
import importlib.util
import os


def pipeline(stage, params, x, *, mesh, pieces):
    """The stages one after the other, each on its device, on piece after piece of the batch.

    While the second stage works on one piece, the first does on the next; in the backward pass
    they do the other way round. Huang et al. 2019, "GPipe", arXiv:1811.06965.

    Args:
      stage: ``(params, x) -> y`` of x's shape.
      params: those of all stages, stacked along the first axis of each array.
      x: [B, ...].
      mesh: with an axis "stage".
      pieces: into how many equal ones the batch is cut.
    """
    stages = mesh.shape["stage"]

    def on_device(params, pieces):
        mine = jax.tree.map(lambda p: p[0], params)
        number = lax.axis_index("stage")

        def tick(arrived, t):
            y = stage(mine, jnp.where(number == 0, pieces[t % len(pieces)], arrived))
            return lax.ppermute(y, "stage", [(i, i + 1) for i in range(stages - 1)]), y

        nothing = lax.pcast(jnp.zeros_like(pieces[0]), "stage", to="varying")
        _, ys = lax.scan(tick, nothing, jnp.arange(len(pieces) + stages - 1))
        # What the last stage made after the first pieces had reached it.
        return lax.psum(jnp.where(number == stages - 1, ys[stages - 1:], 0), "stage")

    run = jax.shard_map(on_device, mesh=mesh, in_specs=(P("stage"), P()), out_specs=P())
    y = run(params, x.reshape(pieces, -1, *x.shape[1:]))
    return y.reshape(x.shape)


def ring_attention(q, k, v, *, mesh):
    """Causal attention over sequences of which every device has a part: no device sees all.

    Keys and values go round; each device adds what its queries see of those at hand, softmax's
    denominator as it grows. Liu et al. 2023, "Ring attention", arXiv:2310.01889.

    Args:
      q, k, v: [B, T, H, D], T along the mesh's axis "sequence".
    """
    n = mesh.shape["sequence"]
    forward = [(i, (i + 1) % n) for i in range(n)]

    def on_device(q, k, v):
        mine, (T, D) = lax.axis_index("sequence"), (q.shape[1], q.shape[3])
        steps = jnp.arange(T, dtype=mine.dtype)

        def one(carry, i):
            k, v, top, total, y = carry
            place, there = mine * T + steps, (mine - i) % n * T + steps  # of queries, and keys
            scores = jnp.einsum("bthd,bshd->bhts", q, k) * D ** -0.5
            scores = jnp.where(place[:, None] >= there, scores, -jnp.inf)
            # The first keys are a device's own, of which each query sees one: never all are -inf.
            highest = lax.stop_gradient(jnp.maximum(top, jnp.max(scores, -1)))
            weights, kept = jnp.exp(scores - highest[..., None]), jnp.exp(top - highest)
            y = y * kept[..., None] + jnp.einsum("bhts,bshd->bhtd", weights, v)
            total = total * kept + jnp.sum(weights, -1)
            return (*lax.ppermute((k, v), "sequence", forward), highest, total, y), None

        zero = jnp.zeros_like(q[..., 0]).swapaxes(1, 2)
        start = k, v, zero - jnp.inf, zero, jnp.zeros_like(q).swapaxes(1, 2)
        (*_, total, y), _ = lax.scan(jax.checkpoint(one), start, jnp.arange(n, dtype=jnp.int32))
        return (y / total[..., None]).swapaxes(1, 2)

    spec = P(None, "sequence")
    return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(q, k, v)


def automatic_mesh(axis, devices):
    return Mesh(np.array(devices), (axis,))  # whose axis is Auto, where jax.make_mesh's is Explicit


def stage(params, x):
    return x + jnp.tanh(x @ params["in"]) @ params["out"]


def in_order(params, x, stages):
    """What `pipeline` computes, on one device."""
    for i in range(stages):
        x = stage(jax.tree.map(lambda p: p[i], params), x)
    return x


def pipeline_losses(devices, features=64, batch=32):
    """(loss on two devices, loss on one, arguments)."""
    mesh = automatic_mesh("stage", devices[:2])
    w_key, v_key, x_key = jax.random.split(jax.random.key(0), 3)
    params = {"in": jax.random.normal(w_key, (2, features, 4 * features)) * features ** -0.5,
              "out": jax.random.normal(v_key, (2, 4 * features, features)) * features ** -0.5}
    x = jax.random.normal(x_key, (batch, features))
    mine = lambda params, x: jnp.mean(pipeline(stage, params, x, mesh=mesh, pieces=4) ** 2)
    return mine, lambda params, x: jnp.mean(in_order(params, x, 2) ** 2), (params, x)


def ring_losses(devices, length=256, heads=2, features=16):
    """As `pipeline_losses`, over the whole sequence and parts of it."""
    mesh = automatic_mesh("sequence", devices)
    inputs = tuple(jax.random.normal(jax.random.key(0), (3, 1, length, heads, features)))
    mine = lambda *inputs: jnp.mean(jnp.sin(ring_attention(*inputs, mesh=mesh)))
    one = lambda *inputs: jnp.mean(jnp.sin(jax.nn.dot_product_attention(*inputs, is_causal=True)))
    return mine, one, inputs


def compare(name, mine, one, inputs):
    """Gradients, and temporary memory of a device."""
    argnums = tuple(range(len(inputs)))
    ours, whole = (jax.jit(fbprop.grad(f, argnums)).lower(*inputs).compile() for f in (mine, one))
    pairs = zip(*(jax.tree.leaves(program(*inputs)) for program in (ours, whole)))
    difference = max(float(jnp.max(jnp.abs(np.asarray(a) - np.asarray(b))) / jnp.max(jnp.abs(b)))
                     for a, b in pairs)
    memory = [p.memory_analysis().temp_size_in_bytes / 1e3 for p in (ours, whole)]
    print(f"{name}: gradient within {difference:.0e} of one device's; temporary memory of a device "
          f"{memory[0]:.0f} kB, of one alone {memory[1]:.0f} kB", flush=True)
    return memory


def plot(memories, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    panel.plot(list(memories), [m for m, _ in memories.values()], "o-", label="ring attention")
    panel.set(xlabel="devices", ylabel="temporary memory of a device, kB", xscale="log")
    panel.legend()
    figure.savefig(file, dpi=120)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, default=8, help="CPUs are simulated")
    parser.add_argument("--length", type=int, default=1024, help="of the sequences")
    parser.add_argument("--smoke", action="store_true", help="short sequences")
    parser.add_argument("--plot", metavar="FILE", help="draw memory (needs matplotlib)")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib, which is missing: pip install matplotlib")
    options.length = 64 if options.smoke else options.length
    return options


def main(options):
    devices = jax.devices()[:options.devices]
    compare("pipeline of 2 stages, 4 pieces", *pipeline_losses(devices))
    memories = {}
    for n in dict.fromkeys([2, len(devices)]):
        found = ring_losses(devices[:n], options.length)
        name = f"ring attention, {options.length} steps on {n} devices"
        memories[n] = compare(name, *found)
    if options.plot:
        plot(memories, options.plot)


if __name__ == "__main__":
    options = parse_options()
    os.environ["XLA_FLAGS"] = (f"{os.environ.get('XLA_FLAGS', '')} "
                               f"--xla_force_host_platform_device_count={options.devices}")

import jax  # noqa: E402  (the number of devices is settled before)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import fbprop  # noqa: E402

if __name__ == "__main__":
    main(options)
