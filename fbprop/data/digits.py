"""The embedded handwritten digits.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998 (doi:10.24432/C50P49), licence CC BY 4.0: the 1,797 images of its test file, as
packaged by scikit-learn. 32 x 32 bitmaps counted in blocks of 4 x 4, hence 17 grey levels.
"""

from __future__ import annotations

from importlib import resources

import numpy as np

_TEST = 360  # of 1,797: a fifth


def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Handwritten digits of 8 x 8 pixels, 1,437 to train and 360 to test on.

    The split is always the same, and stratified: each digit's share of the test set is within one
    image of its share of the whole.

    Returns:
      ``(train, test)``, each ``{"image": float32 [n, 8, 8, 1] in 0..1, "label": int32 [n]}`` of
      NumPy arrays. Source: E. Alpaydin and C. Kaynak, UCI, CC BY 4.0.

    Example:
      >>> from fbprop import data
      >>> train, test = data.digits()
      >>> train["image"].shape, test["label"].shape
      ((1437, 8, 8, 1), (360,))
    """
    with resources.files("fbprop.data").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file)
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
    chosen = np.arange(_TEST) * n // _TEST
    return np.sort(np.delete(by_label, chosen)), np.sort(by_label[chosen])
