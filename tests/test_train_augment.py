"""Augmentation: which pictures come out, how often, and that labels mix as the pictures do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbprop.data import augment

KEY = jax.random.key(0)
ONE = jnp.arange(1.0, 13.0).reshape(1, 3, 4, 1)


def kinds(images):
    """The different images of a batch, and how often each occurs."""
    found, counts = np.unique(np.asarray(images).reshape(len(images), -1), axis=0,
                              return_counts=True)
    return {tuple(image): count for image, count in zip(found, counts)}


def test_shifts_are_all_of_them_and_equally_often():
    got = kinds(augment.random_shift(KEY, jnp.tile(ONE, (900, 1, 1, 1)), 1))
    padded = np.pad(ONE[0, :, :, 0], 1)
    expected = {tuple(padded[i:i + 3, j:j + 4].ravel()) for i in range(3) for j in range(3)}
    assert set(got) == expected
    assert min(got.values()) > 60  # of 100; the standard deviation is 9.4
    assert kinds(augment.random_shift(KEY, ONE, 0)) == kinds(ONE)


def test_crops_are_all_windows_and_equally_often():
    got = kinds(augment.random_crop(KEY, jnp.tile(ONE, (600, 1, 1, 1)), (2, 2)))
    image = np.asarray(ONE[0, :, :, 0])
    assert set(got) == {
        tuple(image[i:i + 2, j:j + 2].ravel()) for i in range(2) for j in range(3)
    }
    assert min(got.values()) > 60
    assert kinds(augment.random_crop(KEY, ONE, (3, 4))) == kinds(ONE)


def test_flips_keep_channels_and_have_their_probability():
    images = jnp.arange(24.0).reshape(1, 3, 4, 2)
    got = kinds(augment.random_flip(KEY, jnp.tile(images, (1000, 1, 1, 1)), 0.3))
    mirrored = tuple(np.asarray(images)[0, :, ::-1].ravel())
    assert set(got) == {tuple(np.asarray(images).ravel()), mirrored}
    assert 230 < got[mirrored] < 370  # 300; the standard deviation is 14.5
    chex.assert_trees_all_equal(augment.random_flip(KEY, images, 0.0), images)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mixtures_are_of_two_examples_in_one_proportion(dtype):
    inputs = jnp.eye(50, dtype=dtype)[:, :, None]
    targets = jnp.eye(50, dtype=dtype)
    x, y = augment.mixup(KEY, inputs, targets, 1.0)
    assert x.dtype == y.dtype == dtype
    chex.assert_trees_all_equal(x[:, :, 0], y)
    shares = np.sort(np.asarray(y, np.float64), axis=1)[:, ::-1]
    np.testing.assert_allclose(shares[:, :2].sum(axis=1), 1, atol=float(jnp.finfo(dtype).eps))
    assert not shares[:, 2:].any()
    assert (np.argmax(np.asarray(y, np.float32), axis=1) == np.arange(50)).all()
    # max(λ, 1 − λ) of even λ is 3/4 on average; the mean of 50 has a deviation of 0.02.
    assert 0.68 < shares[:, 0].mean() < 0.82


FUNCTIONS = [(augment.random_shift, 1), (augment.random_crop, (2, 3)), (augment.random_flip, 0.5)]


@pytest.mark.parametrize(("function", "argument"), FUNCTIONS)
def test_the_key_decides_under_jit_and_dtypes_stay(function, argument, x64):
    for dtype in (jnp.float64, jnp.uint8):
        images = jnp.tile(jnp.arange(12, dtype=dtype).reshape(1, 3, 4, 1), (20, 1, 1, 1))
        jitted = jax.jit(function, static_argnums=2)
        got, again, other = (jitted(jax.random.key(i), images, argument) for i in (0, 0, 1))
        assert got.dtype == dtype
        chex.assert_trees_all_equal(got, again)
        assert not np.array_equal(got, other)


ERRORS = {
    "three axes": (ValueError, r"got shape \(3, 4, 1\)", lambda: augment.random_flip(KEY, ONE[0])),
    "shift": (ValueError, "got pixels=-1", lambda: augment.random_shift(KEY, ONE, -1)),
    "crop": (
        ValueError, r"got size=\(4, 4\) expected 1 to 3 and 1 to 4",
        lambda: augment.random_crop(KEY, ONE, (4, 4)),
    ),
    "probability": (ValueError, r"got 2 expected one in", lambda: augment.random_flip(KEY, ONE, 2)),
    "labels": (
        TypeError, "got targets of dtype int32",
        lambda: augment.mixup(KEY, jnp.ones(2), jnp.arange(2)),
    ),
    "alpha": (ValueError, "got alpha=0", lambda: augment.mixup(KEY, ONE, ONE, 0)),
    "lengths": (
        ValueError, "lengths 1 and 2", lambda: augment.mixup(KEY, ONE, jnp.ones(2))
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_expected(name):
    error, text, call = ERRORS[name]
    with pytest.raises(error, match=text):
        call()
