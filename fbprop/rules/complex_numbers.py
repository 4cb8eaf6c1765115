"""Rules for complex numbers and Fourier transforms.

JAX's convention: the cotangent of z = a + ib is z̄ = ∂L/∂a − i ∂L/∂b, so that a holomorphic f
has x̄ = ȳ f'(x). Taking a and b apart or together therefore flips the imaginary part's sign.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from fbprop.core.rule import broadcasting, linear


def _conj(dy, *, x_aval):
    return lax.conj(dy) if jnp.issubdtype(x_aval.dtype, jnp.complexfloating) else lax.real(dy)


def _fft(dy, *, fft_type, fft_lengths):
    """The transposed transform. Complex ones are their own: the matrix ω^(jk) is symmetric."""
    if fft_type is lax.FftType.RFFT:
        return _rfft(dy, fft_lengths)
    if fft_type is lax.FftType.IRFFT:
        return _irfft(dy, fft_lengths)
    return lax.fft(dy, fft_type, fft_lengths)


def _rfft(dy, lengths):
    """x̄ = Re Σ ȳₖ ω^(jk) over the stored half of the spectrum: an inverse real transform.

    That one counts every stored frequency twice, once for its missing mirror image, but for the
    first and, at even length, the middle one, which are their own mirror images.
    """
    spectrum = lax.conj(dy) / _images(lengths[-1], dy)
    return lax.fft(spectrum, lax.FftType.IRFFT, lengths) * math.prod(lengths)


def _irfft(dy, lengths):
    """x̄ = conj(rfft ȳ) / N, frequencies that stand for two twice."""
    spectrum = lax.fft(dy, lax.FftType.RFFT, lengths)
    return lax.conj(spectrum) * _images(lengths[-1], spectrum) / math.prod(lengths)


def _images(n, spectrum):
    """How many of the n frequencies each of the n // 2 + 1 stored ones stands for."""
    k = lax.broadcasted_iota(jnp.int32, spectrum.shape, spectrum.ndim - 1)
    return jnp.where((k == 0) | (2 * k == n), 1, 2).astype(spectrum.dtype)


RULES = [
    linear("real", "y = Re x;  x̄ = ȳ + 0i", lambda dy: lax.complex(dy, jnp.zeros_like(dy))),
    linear("imag", "y = Im x;  x̄ = −iȳ", lambda dy: lax.complex(jnp.zeros_like(dy), -dy)),
    broadcasting(
        "complex", "y = a + ib;  ā = Re ȳ, b̄ = −Im ȳ", a=lax.real, b=lambda dy: -lax.imag(dy)
    ),
    linear("conj", "y = conj x;  x̄ = conj ȳ; Re ȳ for a real x", _conj),
    linear(
        "fft",
        "y = F x over the last dimensions, F of kind FFT, IFFT, RFFT or IRFFT;  x̄ = Fᵀ ȳ: the same "
        "transform for the complex kinds, the opposite one with weights for the real kinds",
        _fft,
    ),
]
