"""The embedded digits and batching."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop import data

KEY = jax.random.key(0)


def test_digits_have_their_shapes_dtypes_and_range():
    for part, n in zip(data.digits(), (1437, 360)):
        assert {k: (v.shape, v.dtype.name) for k, v in part.items()} == {
            "image": ((n, 8, 8, 1), "float32"), "label": ((n,), "int32"),
        }
        assert part["image"].min() == 0
        assert part["image"].max() == 1
        chex.assert_trees_all_equal(part["image"] * 16, np.round(part["image"] * 16))


def test_digits_are_split_by_class():
    train, test = data.digits()
    counts = np.bincount(train["label"]) + np.bincount(test["label"])
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.abs(np.bincount(test["label"]) - counts * 360 / 1797).max() <= 1


def test_digits_are_disjoint_and_complete():
    train, test = data.digits()
    images = np.concatenate([train["image"], test["image"]]).reshape(1797, 64)
    # The published images are all different, so none is in both parts or lost.
    assert len(np.unique(images, axis=0)) == 1797


def test_digits_never_change():
    (train, test), again = data.digits(), data.digits()
    chex.assert_trees_all_equal((train, test), again)
    assert train["label"][:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 2]
    assert test["label"][:10].tolist() == [7, 0, 1, 4, 1, 2, 9, 5, 5, 8]
    assert int((test["image"] * 16).astype(int).sum()) == 111758  # grey levels in all


def test_importing_fbprop_does_not_read_the_digits():
    code = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import fbprop
assert any(name.endswith(".py") or name.endswith(".pyc") for name in opened)
before = sum(name.endswith("digits.npz") for name in opened)
from fbprop import data
data.digits()
after = sum(name.endswith("digits.npz") for name in opened)
print(before, after)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "1"]


@pytest.mark.parametrize(("n", "size"), [(35, 5), (7, 7), (7, 1)])
def test_batches_hold_every_example_once(n, size):
    indices = data.batches(n, size, key=KEY)
    assert (indices.shape, indices.dtype) == ((n // size, size), jnp.int32)
    assert sorted(indices.ravel().tolist()) == list(range(n))


def test_batches_are_shuffled_by_their_key():
    indices = data.batches(101, 10, key=KEY)
    assert indices.shape == (10, 10)
    assert len(set(indices.ravel().tolist())) == 100
    chex.assert_trees_all_equal(indices, data.batches(101, 10, key=KEY))
    assert not np.array_equal(indices, data.batches(101, 10, key=jax.random.key(1)))
    jitted = jax.jit(lambda key: data.batches(101, 10, key=key))
    chex.assert_trees_all_equal(indices, jitted(KEY))


def test_batches_fill_up_the_last():
    indices = data.batches(11, 3, key=KEY, drop_remainder=False).ravel()
    assert sorted(indices[:11].tolist()) == list(range(11))
    assert indices[11:].tolist() == indices[:1].tolist()


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_iterate_yields_every_example_once(kind):
    examples = {"x": kind(np.arange(22).reshape(11, 2)), "y": kind(np.arange(11))}
    parts = list(data.iterate(examples, 3, key=KEY))
    assert [len(p["y"]) for p in parts] == [3, 3, 3, 2]
    y = np.concatenate([p["y"] for p in parts])
    assert sorted(y.tolist()) == list(range(11))
    assert y.tolist() != list(range(11))
    chex.assert_trees_all_equal(np.concatenate([p["x"] for p in parts])[:, 0], 2 * y)


def test_iterate_goes_in_the_order_of_batches():
    indices = data.batches(11, 3, key=KEY)
    parts = data.iterate(np.arange(11), 3, key=KEY, drop_remainder=True)
    chex.assert_trees_all_equal(np.stack(list(parts)), np.asarray(indices))
    assert [p.tolist() for p in data.iterate(np.arange(3), 2)] == [[0, 1], [2]]


def test_errors():
    with pytest.raises(ValueError, match="got batch_size=8 expected 1 to 7"):
        data.batches(7, 8)
    with pytest.raises(ValueError, match="got batch_size=0 expected 1 to 7"):
        data.batches(7, 0)
    with pytest.raises(ValueError, match="got batch_size=3 expected 1 to 2"):
        data.iterate(np.arange(2), 3)
    with pytest.raises(ValueError, match=r"got lengths \[2, 3\] expected one length"):
        data.iterate((np.arange(2), np.arange(3)), 1)


def test_digits_of_a_file(tmp_path):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 17, (23, 8, 8), np.uint8), np.arange(23) % 10
    np.savez(tmp_path / "mine.npz", image=image, label=label)
    train, test = data.digits(tmp_path / "mine.npz")
    assert (len(train["label"]), len(test["label"])) == (18, 5)
    both = np.concatenate([train["image"], test["image"]]) * 16
    assert sorted(map(bytes, both.astype(np.uint8))) == sorted(map(bytes, image))


@pytest.mark.parametrize("arrays", [
    {"image": np.zeros((3, 8, 8))}, {"label": np.zeros(3)},
    {"image": np.zeros((3, 7, 8)), "label": np.zeros(3)},
    {"image": np.zeros((3, 8, 8)), "label": np.zeros(2)},
])
def test_digits_of_a_file_that_holds_something_else(arrays, tmp_path):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=r"image \[n, 8, 8\] and label \[n\], got .* expected"):
        data.digits(tmp_path / "other.npz")
