"""Data sets and readers, downloads, batches, prefetching to the device, augmentation."""

from fbprop.data import augment
from fbprop.data.batching import batches, iterate
from fbprop.data.digits import digits
from fbprop.data.download import DownloadError, download
from fbprop.data.fashion import fashion_mnist
from fbprop.data.idx import read_idx
from fbprop.data.pgm import read_pgm
from fbprop.data.prefetch import prefetch
from fbprop.data.shakespeare import shakespeare
from fbprop.data.wav import read_wav

__all__ = [
    "DownloadError", "augment", "batches", "digits", "download", "fashion_mnist", "iterate",
    "prefetch", "read_idx", "read_pgm", "read_wav", "shakespeare",
]
