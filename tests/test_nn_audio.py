"""Log-mel features against the formula, by loops in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbprop
from fbprop import nn

OPTIONS = {"sample_rate": 8000, "n_fft": 64, "hop": 24, "n_mels": 5}


def mel(hertz):
    return 2595 * np.log10(1 + hertz / 700)


def filters_by_loops(sample_rate, n_fft, n_mels, low, high):
    """Interpolation of the triangle (0, 1, 0) over three points, one filter at a time."""
    grid = np.linspace(mel(low), mel(high), 10_001)
    hertz = np.linspace(low, high, 100_001)
    points = np.interp(grid[:: 10_000 // (n_mels + 1)][: n_mels + 2], mel(hertz), hertz)
    frequencies = np.fft.rfftfreq(n_fft, 1 / sample_rate)
    return np.stack([np.interp(frequencies, points[m:m + 3], [0, 1, 0]) for m in range(n_mels)], 1)


@pytest.mark.parametrize("case", [(8000, 64, 4, 0.0, 4000.0), (16000, 128, 9, 100.0, 7000.0)])
def test_mel_filters_are_triangles_on_the_mel_scale(case):
    sample_rate, n_fft, n_mels, low, high = case
    got = nn.mel_filters(sample_rate, n_fft, n_mels, low=low, high=high)
    assert got.shape == (n_fft // 2 + 1, n_mels)
    np.testing.assert_allclose(got, filters_by_loops(*case), atol=1e-6)


def by_loops(signal):
    filters = nn.mel_filters(8000, 64, 5)
    window = np.sin(np.pi * np.arange(64) / 64) ** 2
    rows = []
    for start in range(0, len(signal) - 63, 24):
        spectrum = np.fft.rfft(signal[start:start + 64] * window)
        rows.append(np.log(np.maximum(np.abs(spectrum) ** 2 @ filters, 1e-10)))
    return np.stack(rows)


def test_log_mel_equals_loops(x64):
    signal = np.random.default_rng(0).normal(size=(3, 2, 201))
    features = nn.log_mel(jnp.asarray(signal), **OPTIONS)
    assert features.shape == (3, 2, 1 + (201 - 64) // 24, 5)
    chex.assert_trees_all_close(features[2, 1], by_loops(signal[2, 1]), rtol=1e-10)


def test_log_mel_gradient_is_that_of_jax(x64):
    signal = jnp.asarray(np.random.default_rng(0).normal(size=(2, 101)))
    loss = lambda signal: jnp.sum(jnp.sin(nn.log_mel(signal, **OPTIONS)))
    ours, theirs = (jax.jit(d(loss))(signal) for d in (fbprop.grad, jax.grad))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert np.all(np.isfinite(fbprop.grad(loss)(jnp.zeros(101))))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_log_mel_dtype_and_silence(x64, dtype):
    features = nn.log_mel(jnp.zeros(64, dtype), **OPTIONS, floor=1e-5)
    assert features.dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_allclose(features, np.log(1e-5), rtol=1e-6)


ERRORS = {
    "short": (ValueError, "frames of n_fft=64 samples, got 63 samples expected at least as many",
              lambda: nn.log_mel(jnp.zeros(63), **OPTIONS)),
    "band": (ValueError, r"got low=0.0, high=5000 expected 0 <= low < high <= 4000.0 Hz",
             lambda: nn.mel_filters(8000, 64, 5, high=5000)),
    "narrow": (ValueError, "got n_mels=40 with filter 0 between two of n_fft=64",
               lambda: nn.mel_filters(8000, 64, 40)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
