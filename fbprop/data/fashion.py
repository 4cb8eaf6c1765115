"""Fashion-MNIST: pictures of clothes, read from its four files.

Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, H. Xiao, K. Rasul
and R. Vollgraf, 2017 (arXiv:1708.07747), MIT licence.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np

from fbprop.data.download import download
from fbprop.data.idx import read_idx

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)
# Of the files as published; Debian compresses the same contents again.
_SHA256 = {
    "train-images-idx3-ubyte.gz":
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz":
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz":
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz":
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}


def fashion_mnist(folder: str | os.PathLike | None = None, download: bool = False):
    """Grey pictures of clothes, 28 x 28 pixels, ten classes: 60,000 to train, 10,000 to test on.

    Args:
      folder: where the four files ``{train,t10k}-{images-idx3,labels-idx1}-ubyte`` are, compressed
        (.gz) or not. None: where Debian's package ``dataset-fashion-mnist`` puts them,
        ``/usr/share/datasets/fashion-mnist``.
      download: fetch the files that ``folder``, to be given then, has not got: 31 MB.

    Returns:
      ``(train, test)``, each ``{"image": float32 [n, 28, 28, 1] in 0..1, "label": int32 [n]}`` of
      NumPy arrays; ``fbprop.data.fashion.CLASSES`` names the labels.
      Source: Xiao, Rasul and Vollgraf 2017 (Zalando), MIT.

    Raises:
      FileNotFoundError: a file is missing.   ValueError: a file is damaged, or images and labels
      do not belong together.   DownloadError: see `download`.

    Example:
      >>> from fbprop import data
      >>> data.fashion_mnist("nowhere")  # or "clothes", download=True
      Traceback (most recent call last):
      FileNotFoundError: Fashion-MNIST is four files, got no train-images-idx3-ubyte expected it...
    """
    if download and folder is None:
        raise ValueError(
            "A download needs a place, got folder=None with download=True; expected a folder."
        )
    folder = pathlib.Path(DEBIAN if folder is None else folder)
    if download:
        _fetch(folder)
    return _part(folder, "train"), _part(folder, "t10k")


def _fetch(folder):
    for name, sha256 in _SHA256.items():
        if not any(file.exists() for file in _files(folder, name.removesuffix(".gz"))):
            download(f"{URL}/{name}", folder / name, sha256=sha256)


def _part(folder, name):
    image = read_idx(_file(folder, f"{name}-images-idx3-ubyte"))
    label = read_idx(_file(folder, f"{name}-labels-idx1-ubyte"))
    if image.ndim != 3 or label.shape != image.shape[:1] or label.max(initial=0) >= len(CLASSES):
        raise ValueError(
            f"Fashion-MNIST has a class of 0 to 9 for every picture, got {name} pictures "
            f"{list(image.shape)} and labels {list(label.shape)} up to {label.max(initial=0)}; "
            f"expected [n, 28, 28] and [n], in {folder}."
        )
    return {
        "image": image.astype(np.float32)[..., None] / np.float32(255),
        "label": label.astype(np.int32),
    }


def _files(folder, name):
    return folder / f"{name}.gz", folder / name


def _file(folder, name):
    for file in _files(folder, name):
        if file.exists():
            return file
    raise FileNotFoundError(
        f"Fashion-MNIST is four files, got no {name} expected it, or {name}.gz, in {folder}: "
        "install Debian's dataset-fashion-mnist, or call fashion_mnist(folder, download=True)."
    )
