"""The embedded handwritten digits.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998 (doi:10.24432/C50P49), licence CC BY 4.0: the 1,797 images of its test file, as
packaged by scikit-learn. 32 x 32 bitmaps counted in blocks of 4 x 4, hence 17 grey levels.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib
from importlib import resources

import numpy as np


def digits(
    file: str | os.PathLike | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Handwritten digits of 8 x 8 pixels, 1,437 to train and 360 to test on.

    The split is always the same, and stratified: each digit's share of the test set is within one
    image of its share of the whole.

    Args:
      file: an .npz file of other ones: ``image`` [n, 8, 8] in 0..16, ``label`` [n] integers. A
        fifth is the test set. None: the embedded ones.

    Raises:
      ValueError: the file holds something else.

    Returns:
      ``(train, test)``, each ``{"image": float32 [n, 8, 8, 1] in 0..1, "label": int32 [n]}`` of
      NumPy arrays. Source: E. Alpaydin and C. Kaynak, UCI, CC BY 4.0.

    Example:
      >>> from fbprop import data
      >>> train, test = data.digits()
      >>> train["image"].shape, test["label"].shape
      ((1437, 8, 8, 1), (360,))
    """
    source = resources.files("fbprop.data") / "digits.npz" if file is None else pathlib.Path(file)
    try:
        with source.open("rb") as opened:
            stored = dict(np.load(opened))
    except (EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Digits are stored as .npz, got {file}, which is none or damaged ({error}); expected "
            "a file of np.savez(file, image=..., label=...)."
        ) from None
    shapes = {name: stored[name].shape for name in ("image", "label") if name in stored}
    if shapes.get("image", ())[1:] != (8, 8) or shapes.get("label") != shapes["image"][:1]:
        raise ValueError(
            f"Digits are arrays image [n, 8, 8] and label [n], got {shapes} expected these in "
            f"{file}: store them with np.savez(file, image=..., label=...)."
        )
    image, label = stored["image"], stored["label"].astype(np.int32)
    image = image.astype(np.float32)[..., None] / 16
    train, test = _split(label)
    return tuple({"image": image[i], "label": label[i]} for i in (train, test))


def _split(label):
    """Indices of the two parts: every fifth, on average, of a shuffle sorted by label.

    NumPy keeps `RandomState`'s numbers the same for ever (NEP 19), so the split never changes.
    """
    n = len(label)
    shuffled = np.random.RandomState(0).permutation(n)
    by_label = shuffled[np.argsort(label[shuffled], kind="stable")]
    test = -(-n // 5)
    chosen = np.arange(test) * n // test
    return np.sort(np.delete(by_label, chosen)), np.sort(by_label[chosen])
