"""Grey pictures in the binary PGM format (Netpbm's "portable graymap", P5)."""

from __future__ import annotations

import os
import pathlib
import re

import numpy as np

_SPACE = rb"(?:\s|#[^\n]*\n)+"  # comments count as white space
_HEADER = re.compile(
    rb"P5" + _SPACE + rb"(\d+)" + _SPACE + rb"(\d+)" + _SPACE + rb"(\d+)(?:#[^\n]*\n)*\s"
)


def read_pgm(path: str | os.PathLike) -> np.ndarray:
    """The grey levels in a binary PGM file.

    Args:
      path: the file; P5, at most 65,535 grey levels above black.

    Returns:
      [height, width], uint8, or uint16 if the largest possible level is above 255.

    Raises:
      ValueError: no binary PGM file, or one with too few or too many pixels.

    Example:
      >>> import pathlib, tempfile
      >>> from fbprop import data
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.pgm"
      >>> _ = file.write_bytes(b"P5 3 2 255 " + bytes([0, 50, 100, 150, 200, 250]))
      >>> data.read_pgm(file).tolist()
      [[0, 50, 100], [150, 200, 250]]
    """
    content = pathlib.Path(path).read_bytes()
    head = _HEADER.match(content)
    if head is None or not 0 < int(head[3]) < 65536:
        raise ValueError(
            f"A binary PGM file begins with P5, width, height and largest level, got "
            f"{content[:20]!r} expected e.g. b'P5 92 112 255 ', in {path}."
        )
    width, height, dtype = int(head[1]), int(head[2]), ">u1" if int(head[3]) < 256 else ">u2"
    stored = content[head.end():]
    if len(stored) != width * height * np.dtype(dtype).itemsize:
        raise ValueError(
            f"A PGM file has as many pixels as its header says, got {len(stored)} bytes expected "
            f"{width * height * np.dtype(dtype).itemsize} for {width} x {height}, in {path}: the "
            "file is damaged."
        )
    pixels = np.frombuffer(stored, dtype).reshape(height, width)
    return pixels.astype(pixels.dtype.newbyteorder("="))
