"""What other learning rules than backpropagation come to, beside it: accuracy, alignment, memory.

    python examples/learning_rules.py                          # digits; 6 minutes
    python examples/learning_rules.py --data FOLDER            # Fashion-MNIST or MNIST, four files
    python examples/learning_rules.py --method direct,pepita --seeds 1 --plot rules.png
    python examples/learning_rules.py --data FOLDER --network lenet --epochs 10    # as published

For every rule and network: test accuracy after training (mean and range over seeds; the last
network's, none is chosen by the test images), the cosine between the rule's direction and the
gradient of the last network on 500 training images, and the temporary memory of a compiled
direction of 1,024 images.

The deep network is where a hybrid earns its place: of 13 layers the lower 10 learn by direct
feedback, which keeps nothing of them, and the upper ones by backpropagation. On digits (seeds 0 to
2, jax 0.12.0.1, CPU) that is 0.9620 on test images in 2.8 MB; direct feedback alone 0.9509 in 1.6
MB, backpropagation 0.9722 in 6.5 MB.
"""

import argparse
import importlib.util
import pathlib
import time

import jax
import numpy as np

from fbprop import data, learning, nn, optim, train

WIDTHS = {"digits": (128, 64), "images": (256, 128)}
CHANNELS = {"digits": (16, 32), "images": (8, 16)}


def mlp(kind):
    """A list of layers; parameters are a list with a part of each: paths are 0/..., 1/..., 2/..."""
    a, b = WIDTHS[kind]
    return [nn.sequential(nn.flatten(), nn.dense(a), nn.relu()),
            nn.sequential(nn.dense(b), nn.relu()), nn.dense(10)]


def convnet(kind):
    a, b = CHANNELS[kind]
    size, stride = (3, 1) if kind == "digits" else (5, 2)
    return [nn.sequential(nn.conv(a, size, stride=stride), nn.relu()),
            nn.sequential(nn.conv(b, size, stride=2), nn.relu()),
            nn.sequential(nn.flatten(), nn.dense(10))]


def deep(kind):
    return [nn.sequential(nn.flatten(), nn.dense(128, kernel_init=nn.initializers.glorot_uniform()),
                          nn.tanh()) for _ in range(12)] + [nn.dense(10)]


def lenet(kind):
    """BioTorch's for MNIST, whose authors published errors of five rules on Fashion-MNIST."""
    pool = nn.max_pool()
    return [nn.sequential(nn.conv(6, 5, padding=((2, 2), (2, 2))), nn.relu()),
            nn.sequential(pool, nn.conv(16, 5, padding="VALID"), nn.relu()),
            nn.sequential(pool, nn.conv(120, 5, padding="VALID"), nn.relu(), nn.flatten()),
            nn.dense(84), nn.dense(10)]


def wide(kind):
    """784-1000-10, of feedback alignment's paper."""
    return [nn.sequential(nn.flatten(), nn.dense(1000), nn.relu()), nn.dense(10)]


def goodness(kind):
    """Four layers of 2000, of forward-forward's paper; the last is no layer of that rule."""
    return [nn.sequential(nn.flatten(), nn.dense(2000), nn.relu()),
            *[nn.sequential(nn.dense(2000), nn.relu())] * 3, nn.dense(10)]


NETWORKS = {"mlp": mlp, "convnet": convnet, "deep": deep}
PUBLISHED = {"lenet": lenet, "wide": wide, "goodness": goodness}  # if asked for, of 28 x 28 images


def criterion(logits, labels):
    return nn.softmax_cross_entropy(logits, labels)


def split(batch, *_):
    return batch["image"], batch["label"]


def flat(images):
    return images.reshape(len(images), -1)


def rules(applies):
    """Name -> (rule, learning rate, networks)."""
    dense = ("mlp", "wide", "goodness")
    both, every = (*dense, "convnet", "lenet"), (*dense, "convnet", "lenet", "deep")
    back = learning.backprop()
    again = learning.direct_feedback_alignment(recompute=True)
    lower = learning.greedy(applies, criterion, 10, rate=0.03, split=split)
    return {
        "backprop": (back, 1e-3, every),
        "feedback": (learning.feedback_alignment(), 1e-3, both),
        "sign": (learning.sign_symmetry("fixed_random"), 1e-3, both),
        "sign-batch": (learning.sign_symmetry("batch_random"), 1e-3, ("lenet",)),
        "sign-uniform": (learning.sign_symmetry("uniform"), 1e-3, ("lenet",)),
        "kolen-pollack": (learning.kolen_pollack(3e-4), 1e-3, both),
        "mirror": (learning.weight_mirror(0.1), 1e-3, both),
        "product": (learning.product_feedback(3e-4), 1e-3, both),
        "direct": (learning.direct_feedback_alignment(), 1e-3, both),
        "direct-kp": (learning.direct_kolen_pollack(0.1, 3e-4), 1e-3, both),
        "activity": (learning.activity_forward_gradient(per_example=0), 1e-3, both),
        "evolution": (learning.evolution_strategy(0.02, samples=8), 1e-3, dense),
        "greedy": (lower, 1e-3, both),
        "predictive": (learning.predictive_coding(
            applies, criterion, steps=10, rate=0.2, split=split), 1e-3, both),
        "target": (learning.difference_target_propagation(applies, criterion, split=split), 1e-3,
                   dense),
        "target-direct": (learning.difference_reconstruction(applies, criterion, split=split), 1e-3,
                          dense),
        "target-chain": (learning.difference_reconstruction(
            applies, criterion, direct=False, split=split), 1e-3, dense),
        "forward-forward": (learning.forward_forward(
            applies, 10, split=lambda b, *_: (flat(b["image"]), b["label"])), 1e-3, dense),
        "pepita": (learning.pepita(applies, criterion, split=split), 3e-4, dense),
        "annealed": (learning.blend(learning.feedback_alignment(), optim.linear(1.0, 0.0, 300)),
                     1e-3, both),
        "greedy-below": (learning.by_path({"0/*": lower, "*": back}), 1e-3, both),
        "direct-below": (learning.by_path({
            "2/*": back, "*": learning.direct_feedback_alignment()}), 1e-3, ("mlp", "convnet")),
        "direct-again": (again, 1e-3, ("deep",)),
        "again-below": (learning.by_path({"1[0-2]/*": back, "*": again}), 1e-3, ("deep",)),
    }


def read(options):
    """("digits" or "images", training set, test set)."""
    if options.data is None:
        return "digits", *data.digits()
    sets = []
    for part in ("train", "t10k"):
        images, labels = (idx(pathlib.Path(options.data) / f"{part}-{what}-ubyte")
                          for what in ("images-idx3", "labels-idx1"))
        images = images[..., None].astype(np.float32) / 255
        sets.append({"image": images, "label": labels.astype(np.int32)})
    return "images", *sets


def idx(path):
    return data.read_idx(path if path.exists() else path.with_name(path.name + ".gz"))


def trainer(name, make, kind, sets, options):
    """seed -> (test accuracy, alignment); and bytes of temporary memory of a direction."""
    train_set, test_set = sets
    by_goodness = name == "forward-forward"  # no layer is an output: labels are tried as inputs
    layers = make(kind)[:-1] if by_goodness else make(kind)
    applies = [layer.apply for layer in layers]
    method, rate, _ = rules(applies)[name]
    n, batch = len(train_set["label"]), options.batch
    steps = n // batch * options.epochs
    optimizer = optim.adam(optim.cosine(rate, warmup_steps=0, total_steps=steps))
    first, some, many = ({k: v[:size] for k, v in train_set.items()} for size in (batch, 500, 1024))

    def logits_of(params, images):
        if by_goodness:
            return learning.forward_forward_scores(applies, params, flat(images), 10)
        for apply, p in zip(applies, params):
            images = apply(p, images)
        return images

    def loss(params, batch, key):
        return criterion(logits_of(params, batch["image"]), batch["label"])

    def begin(key):
        init_key, memory_key, run_key = jax.random.split(key, 3)
        params, x = [], first["image"]
        for layer, key in zip(layers, jax.random.split(init_key, len(layers))):
            params.append(layer.init(key, x))
            x = layer.apply(params[-1], x)
        return params, method.init(memory_key, loss, params, first, run_key), run_key

    start, run = jax.jit(begin), train.epoch(loss, optimizer, learning=method)
    aligned = learning.alignment(method, loss)
    right = train.evaluate(lambda p, b: nn.accuracy(logits_of(p, b["image"]), b["label"]), 500)
    params, memory, key = jax.eval_shape(begin, jax.random.key(0))
    one = jax.jit(method.value_and_grad(loss)).lower(params, many, key, memory=memory)

    def trained(seed):
        params, memory, key = start(jax.random.key(seed))
        state = train.init(params, optimizer, key, learning=memory)
        for k in jax.random.split(key, options.epochs):
            order = jax.random.permutation(k, n)[:n // batch * batch]
            state, _ = run(state, train_set, order.reshape(-1, batch))
        found = aligned(state.params, some, key, memory=state.learning)
        return float(right(state.params, test_set)), float(found.total)

    return trained, one.compile().memory_analysis().temp_size_in_bytes


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FOLDER", help="of MNIST's or Fashion-MNIST's four files")
    parser.add_argument("--method", help="names, with commas; default: all")
    parser.add_argument("--network", choices=[*NETWORKS, *PUBLISHED],
                        help=f"default: {', '.join(NETWORKS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--smoke", action="store_true", help="one epoch, one seed, three rules")
    parser.add_argument("--plot", metavar="FILE", help="draw test errors, coloured by alignment")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib, which is missing: pip install matplotlib")
    names = list(rules([lambda p, h: h]))
    if options.method is None:
        options.method = ",".join(names[:3] if options.smoke else names)
    options.method = options.method.split(",")
    if unknown := set(options.method) - set(names):
        parser.error(f"--method has no {sorted(unknown)[0]!r}: choose from {', '.join(names)}")
    if options.network in PUBLISHED and options.data is None:
        parser.error(f"--network {options.network} sees 28 x 28 images: --data FOLDER has them")
    if options.smoke:
        options.epochs, options.seeds, options.network = 1, 1, options.network or "mlp"
    options.epochs = options.epochs or (30 if options.data is None else 3)
    options.batch = options.batch or (32 if options.data is None else 128)
    return options


def plot(rows, file):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    networks = list(dict.fromkeys(row[0] for row in rows))
    figure = Figure(figsize=(4.5 * len(networks) + 1, 5), layout="constrained")
    every = np.atleast_1d(figure.subplots(1, len(networks)))
    for axes, network in zip(every, networks):
        mine = sorted((row for row in rows if row[0] == network), key=lambda row: np.mean(row[2]))
        wrong = [100 * (1 - np.array(row[2])) for row in mine]
        axes.hlines(range(len(mine)), [*map(np.min, wrong)], [*map(np.max, wrong)], color="gray")
        dots = axes.scatter([*map(np.mean, wrong)], range(len(mine)), c=[row[3] for row in mine],
                            vmin=0, vmax=1, zorder=2)
        axes.set(title=network, xlabel="test error, percent", xscale="log",
                 yticks=range(len(mine)), yticklabels=[row[1] for row in mine])
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 7)))  # all nine would overlap
        axes.xaxis.set_minor_formatter("{x:.3g}")
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.tick_params(axis="x", which="both", labelsize=8, rotation=45)
    figure.colorbar(dots, ax=every, label="cosine to the gradient, after training")
    figure.savefig(file, dpi=100)


def main():
    options, start, rows = parse_options(), time.perf_counter(), []
    kind, *sets = read(options)
    sets = [jax.device_put(s) for s in sets]
    print(f"{'network':8s} {'rule':14s} {'accuracy':8s} {'range':15s} {'alignment':9s} memory")
    networks = NETWORKS if options.network is None else [options.network]
    for network in networks:
        make = (NETWORKS | PUBLISHED)[network]
        for name in options.method:
            if network not in rules([lambda p, h: h])[name][2]:
                continue
            trained, size = trainer(name, make, kind, sets, options)
            scores, cosines = zip(*map(trained, range(options.seeds)))
            rows.append((network, name, scores, np.mean(cosines)))
            print(f"{network:8s} {name:14s} {np.mean(scores):.4f}   {min(scores):.4f}-"
                  f"{max(scores):.4f}   {np.mean(cosines):6.3f}   {size / 2**20:7.2f} MB",
                  flush=True)
    print(f"{len(rows)} rows of {options.seeds} seeds after {time.perf_counter() - start:.0f} s")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
