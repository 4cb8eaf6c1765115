"""The IDX format of the MNIST family: a header, then an array in row-major order, big-endian."""

from __future__ import annotations

import gzip
import math
import os
import pathlib
import struct
import zlib

import numpy as np

# Third byte of the header: https://yann.lecun.com/exdb/mnist (LeCun, Cortes and Burges 1998).
_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array in an IDX file, plain or compressed by gzip, whatever its name.

    Args:
      path: the file.

    Returns:
      An array of the shape and type in the header (uint8, int8, int16, int32, float32, float64),
      in this machine's byte order.

    Raises:
      ValueError: the file is damaged, or no IDX file.

    Example:
      >>> import pathlib, tempfile
      >>> from fbprop import data
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.idx"
      >>> _ = file.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + b"abcdef")
      >>> data.read_idx(file).tolist()
      [[97, 98, 99], [100, 101, 102]]
    """
    path = pathlib.Path(path)
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise ValueError(
            "An IDX file begins with 00 00, a type and a number of axes, got "
            f"{content[:4].hex(' ')} expected e.g. 00 00 08 03, in {path}."
        )
    dtype, axes = np.dtype(_DTYPES[content[2]]), content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(
            f"An IDX header has a length for each axis, got {len(content)} bytes expected {start} "
            f"for {axes} axes, in {path}: the file is cut off."
        )
    shape = struct.unpack(f">{axes}I", content[4:start])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(
            f"An IDX file has as many elements as its header says, got {len(content)} bytes "
            f"expected {expected} for {dtype.name} {list(shape)}, in {path}: the file is damaged."
        )
    stored = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return stored.astype(dtype.newbyteorder("="))


def _content(path):
    stored = path.read_bytes()
    if stored[:2] != b"\x1f\x8b":
        return stored
    try:
        return gzip.decompress(stored)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"A compressed file ends where its compressor ended, got {error!s} expected a whole "
            f"gzip file, in {path}: it is damaged, fetch it again."
        ) from None
