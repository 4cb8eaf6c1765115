"""A checkpoint of several processes: each writes what its devices hold, an index names the files.

``step-8.safetensors`` is the index, without arrays; they lie beside it in ``step-8.parts-a``, a
safetensors file per process. The index is written last, and renamed into its place: a checkpoint
is there as a whole or not at all. Of a leaf that several devices hold, one writes it.
"""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from fbprop.data.tensorfile import CheckpointError, Contents, read, read_metadata, write

_LONGEST = 4000  # bytes that processes tell each other


class Piece(NamedTuple):
    """A part of a leaf: where it begins, and the array of which file it is."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: pathlib.Path
    name: str


class WholeFile:
    """Leaves from one file."""

    def __init__(self, contents: Contents):
        self.contents = contents

    def names(self):
        return self.contents.table

    def form(self, name, dtype) -> tuple[tuple[int, ...], int]:
        """A leaf's shape as it is stored, and how many of its bytes there are."""
        stored = _typed(self.contents.array(name), dtype)
        return stored.shape, stored.nbytes

    def region(self, name, dtype, index) -> np.ndarray:
        return np.array(_typed(self.contents.array(name), dtype)[index])


class Parts:
    """Leaves from the files of several processes, of which only what is asked for is read."""

    def __init__(self, path, listed: dict[str, Any]):
        self.path, self.opened = path, {}
        self.digests = {path.parent / listed["directory"] / f["file"]: f["sha256"]
                        for f in listed["files"]}
        self.pieces: dict[str, list[Piece]] = {}
        for file in self.digests:
            for name, (leaf, start, shape) in self._listed(file).items():
                piece = Piece(tuple(start), tuple(shape), file, name)
                self.pieces.setdefault(leaf, []).append(piece)

    def names(self):
        return self.pieces

    def form(self, name, dtype):
        pieces = self.pieces[name]
        ends = [[s + n for s, n in zip(p.start, p.shape)] for p in pieces]
        size = sum(math.prod(p.shape) for p in pieces)
        return tuple(map(max, zip(*ends))), size * np.dtype(dtype or np.uint32).itemsize

    def region(self, name, dtype, index):
        shape, _ = self.form(name, dtype)
        bounds = [s.indices(n)[:2] for s, n in zip(index, shape)]
        out = None
        for piece in self.pieces[name]:
            inside = [(max(a, s), min(b, s + n))
                      for (a, b), s, n in zip(bounds, piece.start, piece.shape)]
            if any(low >= high for low, high in inside):
                continue
            stored = _typed(self.file(piece.file).array(piece.name), dtype)
            if out is None:
                out = np.empty([b - a for a, b in bounds], stored.dtype)
            out[tuple(slice(low - a, high - a) for (low, high), (a, _) in zip(inside, bounds))] = (
                stored[tuple(slice(low - s, high - s)
                             for (low, high), s in zip(inside, piece.start))]
            )
        return np.empty([b - a for a, b in bounds], dtype) if out is None else out

    def file(self, file) -> Contents:
        """A file of the checkpoint, after every check; its bytes stay on the disk."""
        if file not in self.opened:
            self.opened[file] = read(file, mapped=True)
        return self.opened[file]

    def check(self):
        for file in self.digests:
            read(file, mapped=True)

    def _listed(self, file):
        try:
            metadata = read_metadata(file)
            if metadata.get("sha256") == self.digests[file]:
                return json.loads(metadata["pieces"])
            problem = "another checksum than its index says"
        except (OSError, KeyError, ValueError) as error:
            problem = str(error)
        raise CheckpointError(
            f"A checkpoint is whole with the files that its index names, got {self.path} and "
            f"{file} ({problem}); expected it as it was written: use an earlier checkpoint."
        )


def in_parts() -> bool:
    """Whether a checkpoint is written in parts: where there are several processes."""
    return jax.process_count() > 1


def save_parts(path: pathlib.Path, leaves: dict[str, Any], finish: Callable) -> None:
    """Writes this process's file; of all, the first then calls ``finish(list of files)``.

    Every process calls it, and returns when the checkpoint is complete.
    """
    directory = _unused(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, pieces = {}, {}
    for name, leaf in leaves.items():
        for start, piece in _own(leaf):
            label = f"{name}@{','.join(map(str, start))}"
            tensors[label], pieces[label] = piece, [name, start, piece.shape]
    file = f"{jax.process_index()}-of-{jax.process_count()}.safetensors"
    write(directory / file, tensors, {"pieces": json.dumps(pieces)})
    multihost_utils.sync_global_devices(f"{path.name} parts")
    if jax.process_index() == 0:
        files = [f"{i}-of-{jax.process_count()}.safetensors" for i in range(jax.process_count())]
        finish({"directory": directory.name, "files": [
            {"file": f, "sha256": read_metadata(directory / f)["sha256"]} for f in files
        ]})
    multihost_utils.sync_global_devices(f"{path.name} whole")


def remove_orphans(directory: pathlib.Path) -> None:
    """Removes the parts of checkpoints whose index is gone, or names others."""
    for parts in directory.glob("*.parts-[ab]"):
        if parts.name != _directory_of(directory / f"{parts.name[:-8]}.safetensors"):
            shutil.rmtree(parts, ignore_errors=True)


def agreed(decide: Callable) -> pathlib.Path | None:
    """The path that ``decide()`` returns in the first process, in all of them; or its error."""
    if jax.process_count() == 1:
        return decide()
    said, failed = np.zeros(_LONGEST, np.uint8), None
    if jax.process_index() == 0:
        try:
            answer = f"={found}" if (found := decide()) is not None else "-"
        except (OSError, CheckpointError) as error:
            failed, answer = error, f"!{error}"
        text = answer.encode()[:_LONGEST]
        said[:len(text)] = np.frombuffer(text, np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(said)).tobytes().rstrip(b"\0").decode()
    if failed is not None:
        raise failed
    if text.startswith("!"):
        raise CheckpointError(text[1:])
    return pathlib.Path(text[1:]) if text.startswith("=") else None


def _own(leaf):
    """The pieces of a leaf that this process writes: (where one begins, array)."""
    if not isinstance(leaf, jax.Array):
        return [([0] * np.ndim(leaf), np.asarray(leaf))] if jax.process_index() == 0 else []
    return [
        ([s.indices(n)[0] for s, n in zip(shard.index, leaf.shape)], np.asarray(shard.data))
        for shard in leaf.addressable_shards if shard.replica_id == 0
    ]


def _unused(path) -> pathlib.Path:
    """One of two directories for the parts: not that of the checkpoint which is to be replaced."""
    first, second = (path.with_name(f"{path.stem}.parts-{letter}") for letter in "ab")
    return second if _directory_of(path) == first.name else first


def _directory_of(path) -> str | None:
    try:
        return json.loads(read_metadata(path)["fbprop"])["parts"]["directory"]
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _typed(stored, dtype):
    """Stored numbers in their dtype, of which the format may only have the bytes."""
    if dtype is None or stored.dtype == dtype:
        return stored
    return np.frombuffer(stored.tobytes(), dtype).reshape(stored.shape[:-1])
