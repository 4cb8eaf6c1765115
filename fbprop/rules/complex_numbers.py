"""Rules for complex numbers and Fourier transforms."""

RULES = []
