"""The same network on 200 training images, with and without regularisation: learned or memorised?

    python examples/overfitting.py
    python examples/overfitting.py --plot overfitting.png

All variants learn the 200 images by heart. On 1,397 others they read, mean over seeds 0, 1 and 2:
95.1% with nothing, 95.8% with weight decay, 96.7% dropout, 97.1% label smoothing, 94.8% early
stopping, 97.5% augmentation, 98.2% with all of them. The gap is 4.4, 4.9 and 5.4 points with
nothing, 1.9, 1.8 and 1.8 with all (jax 0.10.2, CPU, 55 s of its time). Early stopping alone betters
the test loss where that rises later (seeds 1 and 2), not the accuracy.
"""

import argparse
import importlib.util
import time

import jax
import numpy as np

from fbprop import data, nn, optim, train

# What each variant does against memorising; "early stopping" keeps the parameters that were best
# on the held-out images, the others the last ones.
VARIANTS = {
    "nothing": {},
    "weight decay": {"weight_decay": 0.3},
    "dropout": {"dropout": 0.5},
    "label smoothing": {"smoothing": 0.1},
    "early stopping": {"patience": 40},
    "augmentation": {"shift": 1},
    "all of them": {"weight_decay": 0.3, "dropout": 0.3, "smoothing": 0.1, "shift": 1,
                    "patience": 40},
}


def make_network(dropout):
    return nn.sequential(
        nn.conv(32, 3), nn.relu(),
        nn.conv(32, 3), nn.relu(), nn.max_pool(2),
        nn.conv(64, 3), nn.relu(), nn.max_pool(2),
        nn.flatten(), nn.dropout(dropout), nn.dense(128), nn.relu(),
        nn.dropout(dropout), nn.dense(10),
    )


def make_loss(network, smoothing, shift):
    def loss(params, batch, key):
        shift_key, dropout_key = jax.random.split(key)
        images = data.augment.random_shift(shift_key, batch["image"], shift)
        logits = network.apply(params, images, key=dropout_key, train=True)
        return nn.softmax_cross_entropy(logits, batch["label"], label_smoothing=smoothing)

    return loss


def few_images(seed, file, n=200):
    """n of the 1,797 images to train, as many held out to stop by, and the others to test on."""
    images = jax.tree.map(lambda *parts: np.concatenate(parts), *data.digits(file))
    order = np.random.default_rng(seed).permutation(len(images["label"]))
    parts = order[:n], order[n : 2 * n], order[2 * n :]
    return [{k: v[part] for k, v in images.items()} for part in parts]


def run(variant, sets, options):
    """Trains one variant; returns its history and accuracies on training and test images."""
    train_set, held_out, test_set = sets
    network = make_network(variant.get("dropout", 0.0))
    loss = make_loss(network, variant.get("smoothing", 0.0), variant.get("shift", 0))

    def metric(params, batch):
        logits = network.apply(params, batch["image"])
        return {"loss": nn.softmax_cross_entropy(logits, batch["label"]),
                "accuracy": nn.accuracy(logits, batch["label"])}

    init_key, run_key = jax.random.split(jax.random.key(options.seed))
    optimizer = optim.adamw(2e-3, weight_decay=variant.get("weight_decay", 0.0))
    params = network.init(init_key, train_set["image"])
    done = train.fit(
        loss, optimizer, train.init(params, optimizer, key=run_key), train_set,
        epochs=options.epochs, batch_size=50, metric=metric, held_out=held_out,
        patience=variant.get("patience"),
    )
    params = (done.best if "patience" in variant else done.state).params
    measure = train.evaluate(metric)
    on_train, on_test = (jax.device_get(measure(params, s)) for s in (train_set, test_set))
    return done.history, on_train, on_test


def plot(results, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, name in enumerate(("nothing", "all of them")):
        history = results[name][0]
        epochs = [row["epoch"] for row in history]
        for part, style in (("train", "--"), ("held_out", "-")):
            left.plot(epochs, [row[part]["loss"] for row in history], style, color=f"C{color}",
                      label=f"{name}, {'training' if part == 'train' else 'held-out'}")
    left.set(xlabel="epoch", ylabel="loss (nats), as trained or held out", yscale="log",
             ylim=(1e-3, None))
    left.legend(fontsize="small")
    for y, (_, on_train, on_test) in enumerate(results.values()):
        right.plot([on_test["accuracy"], on_train["accuracy"]], [y, y], color="0.7", zorder=1)
        right.scatter(on_train["accuracy"], y, color="C2", label="" if y else "200 training images")
        right.scatter(on_test["accuracy"], y, color="C3", label="" if y else "1,397 test images")
    right.set(xlabel="accuracy", yticks=range(len(results)), yticklabels=results)
    right.invert_yaxis()
    right.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2)
    figure.savefig(file, dpi=120)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FILE", help=".npz of other digits; default: embedded")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0, help="of images, parameters and training")
    parser.add_argument("--smoke", action="store_true", help="two short runs, to see that it works")
    parser.add_argument("--plot", metavar="FILE", help="draw losses and gaps (needs matplotlib)")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib, which is missing: pip install matplotlib")
    options.epochs = 2 if options.smoke else options.epochs
    return options


def main():
    options, start = parse_options(), time.perf_counter()
    names = ("nothing", "all of them") if options.smoke else VARIANTS
    sets, results = few_images(options.seed, options.data), {}
    print(f"{'':16s}  training  test    gap     loss in training and test")
    for name in names:
        results[name] = history, on_train, on_test = run(VARIANTS[name], sets, options)
        gap = on_train["accuracy"] - on_test["accuracy"]
        print(f"{name:16s}  {on_train['accuracy']:.4f}    {on_test['accuracy']:.4f}  {gap:.4f}  "
              f"{on_train['loss']:.4f}  {on_test['loss']:.4f} nats after {history[-1]['epoch']} "
              "epochs", flush=True)
    gaps = [r[1]["accuracy"] - r[2]["accuracy"] for r in results.values()]
    seconds = time.perf_counter() - start
    print(f"gap between training and test accuracy: {gaps[0]:.4f} with nothing, {gaps[-1]:.4f} "
          f"with all of them, after {seconds:.0f} s")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
