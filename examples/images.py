"""A convolutional network learns to tell clothes apart on Fashion-MNIST.

    python examples/images.py --data FOLDER             # 5 epochs
    python examples/images.py --data FOLDER --download  # fetch the four files first: 31 MB
    python examples/images.py --epochs 20 --shift 1     # 0.9417, seed 0, 1,060 s of CPU time

Accuracy on the 10,000 test images after 5 epochs on 60,000: 0.9345, 0.9357 and 0.9333 with seeds
0, 1 and 2 (jax 0.10.2, CPU, 290 s of its time: half of that on two free cores). It is the last
network's; none is chosen by the test images.
"""

import argparse
import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np

from fbprop import data, nn, optim, train
from fbprop.data.fashion import CLASSES


def stage(features):
    """Pooling comes before norm and activation, which then have a quarter of the work."""
    return nn.sequential(
        nn.conv(features, 3, bias=False), nn.max_pool(2), nn.batch_norm(), nn.relu(), name="stage",
    )


network = nn.sequential(
    stage(32), stage(64), stage(128),
    nn.residual(nn.conv(128, 3, bias=False), nn.batch_norm(), nn.relu()),
    nn.flatten(), nn.dense(10, name="head"),
)


def standardised(images):
    return (images - 0.286) / 0.353  # mean and standard deviation of the training images


def make_loss(shift):
    def loss(params, batch, key, state):
        """Of mirrored and shifted images, with labels smoothed: a shirt is a shirt either way."""
        flip_key, shift_key = jax.random.split(key)
        images = data.augment.random_flip(flip_key, batch["image"])
        images = standardised(data.augment.random_shift(shift_key, images, shift))
        logits, state = network.apply(params, images, state=state, train=True)
        value = nn.softmax_cross_entropy(logits, batch["label"], label_smoothing=0.1)
        return value, {}, state

    return loss


def logits_of(params, images, state):
    """Mean over each image and its mirror image."""
    both = [network.apply(params, standardised(x), state=state)[0]
            for x in (images, images[:, :, ::-1])]
    return (both[0] + both[1]) / 2


def metric(params, batch, state):
    logits = logits_of(params, batch["image"], state)
    return {"loss": nn.softmax_cross_entropy(logits, batch["label"]),
            "accuracy": nn.accuracy(logits, batch["label"])}


def make_optimizer(steps):
    """Muon for convolutions, Adam for the rest; rates rise for a tenth of the steps, then fall."""
    rates = [optim.cosine(peak, warmup_steps=steps // 10, total_steps=steps)
             for peak in (0.02, 0.004)]
    return optim.muon(rates[0], adam_learning_rate=rates[1], matrices="*conv/kernel")


def read(options):
    """Training and test set; for a smoke test without files, noise with a bright row per class."""
    if options.smoke and options.data is None:
        print("smoke test on synthetic images: give --data for Fashion-MNIST")
        label = np.arange(300, dtype=np.int32) % 10
        image = np.random.default_rng(0).random((300, 28, 28, 1), np.float32) / 2
        image[np.arange(300), 2 * label + 4] += 0.5
        return [{"image": image[i::3], "label": label[i::3]} for i in (0, 1)]
    sets = data.fashion_mnist(options.data, options.download)
    n = 300 if options.smoke else None
    return [{k: v[:n] for k, v in part.items()} for part in sets]


def plot(history, predicted, test_set, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["held_out"]["accuracy"] for row in history], "o-")
    left.set(xlabel="epoch", ylabel="test accuracy")
    left.xaxis.get_major_locator().set_params(integer=True)
    shares = np.stack([np.bincount(predicted[test_set["label"] == k], minlength=10)
                       / np.sum(test_set["label"] == k) for k in range(10)])
    right.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(shares >= 0.01):
        right.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=7,
                   color="white" if shares[i, j] > 0.5 else "black")
    right.set(xlabel="read as (percent)", xticks=range(10), yticks=range(10), yticklabels=CLASSES)
    right.set_xticklabels(CLASSES, rotation=40, ha="right")
    figure.savefig(file, dpi=120)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FOLDER", help="of the four files; default: Debian's")
    parser.add_argument("--download", action="store_true", help="fetch them into --data")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--shift", type=int, default=0, help="augmentation: by up to that many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="one epoch of 100 images")
    parser.add_argument("--plot", metavar="FILE", help="draw accuracy and confusions")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib, which is missing: pip install matplotlib")
    options.epochs = 1 if options.smoke else options.epochs
    return options


def main():
    options, start = parse_options(), time.perf_counter()
    train_set, test_set = read(options)
    batch_size = 20 if options.smoke else 128
    init_key, run_key = jax.random.split(jax.random.key(options.seed))
    images = train_set["image"][:1]
    optimizer = make_optimizer(len(train_set["label"]) // batch_size * options.epochs)
    state = train.init(network.init(init_key, images), optimizer, key=run_key,
                       model_state=network.init_state(images))
    done = train.fit(make_loss(options.shift), optimizer, state, train_set, epochs=options.epochs,
                     batch_size=batch_size, metric=metric, held_out=test_set)
    for row in done.history:
        print(f"epoch {row['epoch']:2d}  loss {row['train']['loss']:.4f}  test accuracy "
              f"{row['held_out']['accuracy']:.4f}  {row['seconds']:.0f} s")
    run = train.predict(lambda p, images: logits_of(p, images, done.state.model_state))
    predicted = np.asarray(jnp.argmax(run(done.state.params, test_set["image"]), -1))
    for number, name in enumerate(CLASSES):
        of = test_set["label"] == number
        print(f"{name:10s}  {np.mean(predicted[of] == number):.3f} of {of.sum()} right")
    print(f"test accuracy {np.mean(predicted == test_set['label']):.4f} after "
          f"{time.perf_counter() - start:.0f} s")
    if options.plot:
        plot(done.history, predicted, test_set, options.plot)


if __name__ == "__main__":
    main()
