"""Sound as pictures: log-mel features."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from fbprop.core.precision import at_least_float32


def log_mel(signal, *, sample_rate: int, n_fft: int = 400, hop: int = 160, n_mels: int = 80,
            low: float = 0.0, high: float | None = None, floor: float = 1e-10):
    """Log-mel features of a sound: how loud each of n_mels bands of pitch is at each moment.

    Frames of n_fft samples, hop apart and without padding, times a periodic Hann window; the
    squared magnitudes of their Fourier transform, weighted by `mel_filters`; the natural logarithm.
    Differentiable with respect to the signal.

    Args:
      signal: [..., samples], floating.
      sample_rate: samples per second.
      n_fft: samples per frame: 400 at 16 kHz are 25 ms.
      hop: samples from one frame to the next.
      n_mels, low, high: see `mel_filters`.
      floor: a band's energy counts as no less, in units of signal², so silence is log(floor).

    Returns:
      [..., frames, n_mels], frames = 1 + (samples − n_fft) // hop; float32 for 16-bit signals,
      otherwise the signal's dtype.

    Raises:
      ValueError: fewer samples than n_fft; a band without a frequency (see `mel_filters`).

    Example:
      >>> import jax.numpy as jnp
      >>> from fbprop import nn
      >>> tone = jnp.sin(2 * jnp.pi * 1000 * jnp.arange(8000.0) / 8000)
      >>> features = nn.log_mel(tone, sample_rate=8000, n_fft=256, hop=128, n_mels=20)
      >>> features.shape, int(features[0].argmax())
      ((61, 20), 9)
    """
    samples = signal.shape[-1]
    if samples < n_fft:
        raise ValueError(
            f"log_mel cuts a signal into frames of n_fft={n_fft} samples, got {samples} samples "
            "expected at least as many: pad the signal, or take shorter frames."
        )
    wide = at_least_float32(signal)
    filters = mel_filters(sample_rate, n_fft, n_mels, low=low, high=high)
    window = np.hanning(n_fft + 1)[:-1]
    at = hop * np.arange(1 + (samples - n_fft) // hop)[:, None] + np.arange(n_fft)
    spectrum = jnp.fft.rfft(wide[..., at] * jnp.asarray(window, wide.dtype))
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    energy = power @ jnp.asarray(filters, wide.dtype)
    return jnp.log(jnp.maximum(energy, floor))


def mel_filters(sample_rate: int, n_fft: int, n_mels: int = 80, *, low: float = 0.0,
                high: float | None = None) -> np.ndarray:
    """Triangular filters, equally spaced on the mel scale, over the frequencies of an rfft.

    mel(f) = 2595 log10(1 + f / 700), f in Hz (O'Shaughnessy 1987; the formula of HTK). Filter m
    rises from 0 to 1 between the m-th and (m+1)-th of n_mels + 2 points and falls to 0 at the next,
    linearly in Hz.

    Args:
      sample_rate: samples per second.
      n_fft: samples per frame; frequency k is k · sample_rate / n_fft.
      n_mels: how many filters.
      low, high: the first and last point, in Hz; high None: sample_rate / 2.

    Returns:
      float64 [n_fft // 2 + 1, n_mels].

    Raises:
      ValueError: not 0 <= low < high <= sample_rate / 2; a filter so narrow that it lies between
        two frequencies, and would always be silent.

    Example:
      >>> from fbprop import nn
      >>> nn.mel_filters(8000, 8, 2).round(2).tolist()
      [[0.0, 0.0], [0.68, 0.32], [0.0, 0.91], [0.0, 0.45], [0.0, 0.0]]
    """
    high = sample_rate / 2 if high is None else high
    if not 0 <= low < high <= sample_rate / 2:
        raise ValueError(
            f"mel_filters span frequencies of the signal, got low={low}, high={high} expected "
            f"0 <= low < high <= {sample_rate / 2} Hz, half the sample rate."
        )
    points = _hertz(np.linspace(_mel(low), _mel(high), n_mels + 2))
    frequencies = np.arange(n_fft // 2 + 1)[:, None] * sample_rate / n_fft
    rising = (frequencies - points[:-2]) / (points[1:-1] - points[:-2])
    falling = (points[2:] - frequencies) / (points[2:] - points[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if (empty := np.flatnonzero(filters.sum(axis=0) == 0)).size:
        raise ValueError(
            f"Each mel filter covers a frequency of the frame, got n_mels={n_mels} with filter "
            f"{empty[0]} between two of n_fft={n_fft} expected none: fewer filters or a larger "
            "n_fft."
        )
    return filters


def _mel(hertz):
    return 2595 * math.log10(1 + hertz / 700)


def _hertz(mel):
    return 700 * (10 ** (mel / 2595) - 1)
