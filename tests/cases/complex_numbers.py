"""Rows of rules/complex_numbers.py."""

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from cases.case import Case, complex_, real

SINGLE = ("float32",)  # complex numbers have one lower precision


def fft(kind, *lengths):
    """The primitive itself; `jax.lax.fft` has a jit around it."""
    kind = lax.FftType[kind]
    return lambda x: primitives.fft_p.bind(x, fft_type=kind, fft_lengths=lengths)


CASES = [
    Case("real", lax.real, (complex_(2, 3),), dtypes=SINGLE),
    Case("imag", lax.imag, (complex_(2, 3),), dtypes=SINGLE),
    Case("complex", lax.complex, (real(2, 3), real(2, 3)), dtypes=SINGLE),
    Case("complex", lambda a: lax.complex(a, jnp.ones_like(a)), (real(2, 3),), "constant part",
         dtypes=SINGLE),
    Case("conj", lax.conj, (complex_(2, 3),), dtypes=SINGLE),
    Case("conj", lax.conj, (real(2, 3),), "real", dtypes=SINGLE),
    Case("fft", fft("FFT", 5), (complex_(2, 5),), dtypes=SINGLE),
    Case("fft", fft("FFT", 2, 3, 5), (complex_(2, 3, 5),), "3-d", dtypes=SINGLE),
    Case("fft", fft("IFFT", 3, 2), (complex_(2, 3, 2),), "inverse", dtypes=SINGLE),
    Case("fft", fft("RFFT", 5), (real(2, 5),), "real odd", dtypes=SINGLE),
    Case("fft", fft("RFFT", 6), (real(2, 6),), "real even", dtypes=SINGLE),
    Case("fft", fft("RFFT", 1), (real(2, 1),), "real one", dtypes=SINGLE),
    Case("fft", fft("RFFT", 3, 4), (real(2, 3, 4),), "real 2-d", dtypes=SINGLE),
    Case("fft", fft("RFFT", 2, 3, 5), (real(2, 3, 5),), "real 3-d", dtypes=SINGLE),
    Case("fft", fft("IRFFT", 5), (complex_(2, 3),), "inverse real odd", dtypes=SINGLE),
    Case("fft", fft("IRFFT", 6), (complex_(2, 4),), "inverse real even", dtypes=SINGLE),
    Case("fft", fft("IRFFT", 3, 4), (complex_(2, 3, 3),), "inverse real 2-d", dtypes=SINGLE),
    Case("fft", fft("IRFFT", 2, 3, 5), (complex_(2, 3, 3),), "inverse real 3-d", dtypes=SINGLE),
]
