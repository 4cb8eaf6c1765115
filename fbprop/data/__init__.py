"""Data sets that come with the package, batches, prefetching to the device, augmentation."""

from fbprop.data import augment
from fbprop.data.batching import batches, iterate
from fbprop.data.digits import digits
from fbprop.data.prefetch import prefetch

__all__ = ["augment", "batches", "digits", "iterate", "prefetch"]
