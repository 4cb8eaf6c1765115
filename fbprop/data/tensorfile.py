"""Named arrays in one file: the safetensors format with a checksum, written whole or not at all.

Layout (github.com/huggingface/safetensors, "Format"): 8 bytes, the header's length; the header,
JSON from names to dtype, shape and place; the arrays' bytes, one after the other. Nothing in it can
run code, as a pickle can. Of our own are two strings among the header's metadata: ``sha256``, over
the whole file with that one string replaced by zeros, and what `fbprop.train.save` adds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
    "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}
_DTYPES = {code: name for name, code in _CODES.items()} | {"C64": "complex64"}
_ZEROS = "0" * 64


class CheckpointError(ValueError):
    """A file that is damaged, of another model or version, or no checkpoint at all."""


class Contents(NamedTuple):
    """What a file holds: the header's metadata, its table of arrays, and their bytes."""

    metadata: dict[str, str]
    table: dict[str, Any]
    data: np.ndarray

    def array(self, name: str) -> np.ndarray:
        """One array, a view of the file's bytes."""
        entry = self.table[name]
        dtype = jnp.dtype(_DTYPES[entry["dtype"]])
        start, end = entry["data_offsets"]
        return self.data[start:end].view(dtype).reshape(entry["shape"])


def save_tensors(path: str | os.PathLike, tree: Any) -> None:
    """Writes the arrays of a pytree to a safetensors file, for other programs to read.

    Args:
      path: the file; replaced only when the new one is complete.
      tree: a pytree of arrays. Each is called by its path, ``"dense/w"``. A dtype that the format
        does not have (complex, 4-bit) is written as its bytes, uint8 [..., bytes each].

    Raises:
      ValueError: two leaves have the same path.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp
      >>> from fbprop import train
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     train.save_tensors(file, {"dense": {"w": jnp.ones((2, 3), jnp.bfloat16)}})
      ...     {name: (x.shape, x.dtype.name) for name, x in train.load_tensors(file).items()}
      {'dense/w': ((2, 3), 'bfloat16')}
    """
    write(path, {name: np.asarray(x) for name, x in named_leaves(tree).items()}, {})


def load_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name, whoever wrote it.

    Returns:
      NumPy arrays of the file's dtypes, bfloat16 among them.

    Raises:
      CheckpointError: the file is truncated, damaged, or of another format.

    Example: see `save_tensors`.
    """
    contents = read(path)
    return {name: contents.array(name) for name in contents.table}


def named_leaves(tree) -> dict[str, Any]:
    """The leaves of a pytree by their paths, in order."""
    leaves, _ = tree_flatten_with_path(tree)
    named = {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    for name, leaf in named.items():
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise TypeError(
                f"A file holds arrays, got {leaf!r} of type {type(leaf).__name__} at {name!r} "
                "expected an array or a number: keep it in metadata."
            )
    if len(named) != len(leaves) or "__metadata__" in named:
        raise ValueError(
            "Every array in a file has a name of its own, got two leaves whose paths are spelt "
            "alike; expected different ones: rename a dictionary key that contains '/'."
        )
    return named


def write(path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """The file, first beside its place and then renamed into it: never seen half-written."""
    path = pathlib.Path(path)
    # The widest first, so that every array starts at a multiple of its item's size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header = _header(tensors, metadata)
    raw = [_bytes(x) for x in tensors.values()]
    header = header.replace(_stamp(_ZEROS), _stamp(_digest(header, *raw)), 1)
    if path.is_dir():
        raise IsADirectoryError(
            f"Arrays are written to a file, got the directory {path} expected a path where a file "
            "can be: remove it, or choose another name."
        )
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.writelines([len(header).to_bytes(8, "little"), header, *raw])
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # a full disk, an interrupt: nothing half-written stays
        partial.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def read(path, mapped: bool = False) -> Contents:
    """The whole file, after every check that can be made on it.

    ``mapped``: its bytes stay on the disk, and are read again when an array is.
    """
    if mapped and os.path.getsize(path):
        content = np.memmap(path, np.uint8, "r")
    else:
        content = np.fromfile(path, np.uint8)
    header, start = _read_header(path, content[:8].tobytes(), content.size, content[8:].data)
    metadata = header.pop("__metadata__", {})
    _check_table(path, header, content.size - start)
    if metadata.keys() & {"sha256", "fbprop"}:
        text, found = content[8:start].tobytes(), str(metadata.get("sha256"))
        text = text.replace(_stamp(found), _stamp(_ZEROS), 1)
        if found != _digest(text, content[start:]):
            raise CheckpointError(
                f"A checkpoint is read as it was written, got {path} with another checksum than "
                "expected: it is corrupted, use another copy or an earlier checkpoint."
            )
    return Contents(metadata, header, content[start:])


def read_metadata(path) -> dict[str, str]:
    """The header's metadata, without reading or checking the arrays."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(prefix, "little")
        header, _ = _read_header(path, prefix, size, file.read(min(length, size)))
    return header.get("__metadata__", {})


def _header(tensors, metadata) -> bytes:
    # The checksum comes first, so that nothing in a name or in the metadata is mistaken for it.
    header: dict[str, Any] = {"__metadata__": {"sha256": _ZEROS, **metadata}}
    end = 0
    for name, x in tensors.items():
        start, end = end, end + x.size * x.dtype.itemsize
        known = x.dtype.name in _CODES
        header[name] = {
            "dtype": _CODES[x.dtype.name] if known else "U8",
            "shape": [*x.shape] if known else [*x.shape, x.dtype.itemsize],
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _bytes(x: np.ndarray) -> memoryview:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def _stamp(digest: str) -> bytes:
    return f'"sha256":"{digest}"'.encode()


def _digest(*parts) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _read_header(path, prefix: bytes, size: int, rest):
    """The header as a dict, and where the arrays start."""
    length = int.from_bytes(prefix, "little")
    start = 8 + length
    if len(prefix) < 8 or (start > size and bytes(rest[:1]) in (b"", b"{")):
        raise CheckpointError(
            f"A checkpoint is one whole file, got {path} of {size} bytes expected at least "
            f"{max(start, 8)}: it is truncated, use another copy or an earlier checkpoint."
        )
    try:
        header = json.loads(bytes(rest[:length])) if start <= size else None
    except ValueError:  # neither UTF-8 nor JSON
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise CheckpointError(
            f"A checkpoint starts with its header, got {path} without a readable one; expected a "
            "safetensors file: this is another kind of file, or a corrupted one."
        )
    return header, start


def _check_table(path, table, size):
    """Every array lies inside the file and is as long as its shape and dtype say."""
    ends = [0]
    for name, entry in table.items():
        try:
            start, end = entry["data_offsets"]
            itemsize = jnp.dtype(_DTYPES[entry["dtype"]]).itemsize
            fits = start >= 0 and end - start == math.prod(entry["shape"]) * itemsize
            ends.append(end)
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"A safetensors header gives a dtype, shape and place for each array, got {entry} "
                f"for {name!r} in {path}; expected one of {sorted(_DTYPES)} and as many bytes."
            )
    if max(ends) != size:
        raise CheckpointError(
            f"A checkpoint is one whole file, got {path} with {size} bytes of arrays expected "
            f"{max(ends)}: it is truncated or was written to, use another copy."
        )


def _sync_directory(directory):
    """Makes the renaming last through a loss of power; Windows cannot open a directory."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
