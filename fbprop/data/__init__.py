"""Data sets that come with the package, and batches."""

from fbprop.data.batching import batches, iterate
from fbprop.data.digits import digits

__all__ = ["batches", "digits", "iterate"]
