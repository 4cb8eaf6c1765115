"""Checkpoints: a training state in a file, with everything needed to trust it again.

The file is a safetensors file (`fbprop.data.tensorfile`), so other programs can read its arrays.
Its manifest, JSON, names the versions that wrote it, the step, and each leaf's path, shape and
dtype, for what the format itself cannot say (random keys, complex numbers), and carries the
caller's metadata, such as the position in the data. Of several processes each writes a file of its
own, and the manifest names them (`fbprop.train.shards`).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Iterable
from importlib import metadata as installed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbprop.data.tensorfile import CheckpointError, named_leaves, read, read_metadata, write
from fbprop.train.shards import Parts, WholeFile, in_parts, remove_orphans, save_parts

# Raised when an older fbprop could misread a file. 2: the arrays lie in files of their own.
FORMAT = 2
_PACKAGES = ("fbprop", "jax", "jaxlib", "numpy")


def save(path: str | os.PathLike, state: Any, *, metadata: dict | None = None,
         keep_last: int | None = None, keep: Iterable[str | os.PathLike] = ()) -> pathlib.Path:
    """Writes a state to one file; whatever happens meanwhile, the file is the old or the new one.

    The bytes go to a hidden file beside it, reach the disk, and are renamed into place. Several
    processes all call it, with a path that all can write to: each writes what its devices hold to
    a file in a directory beside it, ``NAME.parts-a``, and the file, which names them, comes last.

    Args:
      path: the file; its directory is made if there is none.
      state: any pytree of arrays and random keys, `fbprop.train.State` above all.
      metadata: what else to remember, a dict for JSON: the position in the data, say.
      keep_last: how many checkpoints of the run to leave, this one included; the older ones are
        removed. Those of the run are in the same directory and have the same name but for its
        digits; damaged ones are neither counted nor removed. None: all.
      keep: paths of checkpoints not to remove.

    Returns:
      The path.

    Raises:
      ValueError: ``keep_last`` < 1, or two leaves of one path.   TypeError: ``metadata`` is not
      for JSON.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from fbprop import optim, train
      >>> optimizer = optim.adam(0.1)
      >>> state = train.init({"w": jnp.ones(3)}, optimizer)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = train.save(f"{folder}/step-0.safetensors", state, metadata={"epoch": 1})
      ...     again = train.restore(file, like=state)
      ...     train.read_manifest(file)["metadata"], train.latest(folder) == file
      ({'epoch': 1}, True)
      >>> again.params["w"].tolist()
      [1.0, 1.0, 1.0]
    """
    check_keep_last(keep_last)
    if not isinstance(metadata, (dict, type(None))):
        raise TypeError(f"metadata is a dict for JSON, got {metadata!r} expected a dict, or None.")
    path = pathlib.Path(path)
    named = named_leaves(state)
    manifest = {
        "format": 1,
        "versions": {package: _version(package) for package in _PACKAGES},
        "step": _step(state),
        "leaves": [_description(name, leaf) for name, leaf in named.items()],
        "keys": {name: str(jax.random.key_impl(x)) for name, x in named.items() if _is_key(x)},
        "metadata": metadata or {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)

    def finish(tensors, **more):
        write(path, tensors, {"fbprop": json.dumps(manifest | more)})
        if keep_last is not None:
            _remove_older(path, keep_last, keep)

    plain = {name: _plain(leaf) for name, leaf in named.items()}
    if in_parts():
        save_parts(path, plain, lambda parts: finish({}, format=2, parts=parts))
    else:
        finish({name: np.asarray(leaf) for name, leaf in plain.items()})
    return path


def restore(path: str | os.PathLike, like: Any) -> Any:
    """The state in a checkpoint, after every check; all of it or an error.

    Args:
      path: the file.
      like: a pytree of the structure, shapes and dtypes to expect: ``train.init(...)`` of the same
        model and optimiser, or its `jax.eval_shape`. Its values do not matter and stay as they are.

    Returns:
      A pytree like ``like``, bit for bit what was saved. Arrays go where ``like`` has been put
      explicitly (`jax.device_put`, or a mesh and a layout: any, not only those of the state that
      was saved), otherwise to the default device. All is checked, but of
      the arrays a process only ever holds what its devices need.

    Raises:
      CheckpointError: the file is truncated, corrupted, written by a newer fbprop, no checkpoint,
        or another model's; in the last case the first leaf that differs is named.

    Example: see `save`.
    """
    path = pathlib.Path(path)
    check_format(path, read_manifest(path))
    manifest, stored = _opened(path, read(path, mapped=True))
    _check_stored(path, manifest["leaves"], stored)
    _check_same(path, manifest["leaves"], like)
    leaves = [
        _leaf(stored, entry, manifest["keys"].get(entry["path"]), wanted)
        for entry, wanted in zip(manifest["leaves"], jax.tree.leaves(like))
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_manifest(path: str | os.PathLike) -> dict:
    """What a checkpoint says about itself, without reading or checking its arrays.

    Returns:
      ``{"format", "versions", "step", "leaves": [{"path", "shape", "dtype"}, ...], "keys": {path:
      implementation of a random key}, "metadata"}``.

    Raises:
      CheckpointError: the header is damaged, or the file is no checkpoint.

    Example: see `save`.
    """
    return _manifest(path, read_metadata(path))


def latest(directory: str | os.PathLike) -> pathlib.Path | None:
    """The newest sound checkpoint in a directory, that of the highest step; None without any.

    Every file is read once and its checksum compared. Damaged ones are passed over with a warning
    that names them; files without a manifest, silently. Of what an interrupted write leaves behind
    nothing is taken for a checkpoint.

    Raises:
      CheckpointError: all checkpoints are damaged.   NotADirectoryError: a file of that name.

    Warns:
      RuntimeWarning: some are.

    Example: see `save`.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(
            f"Checkpoints lie in a directory, got the file {directory} expected a directory: pass "
            "its parent, or restore(file, like) to read it."
        )
    steps, damaged = {}, []
    for file in sorted(directory.glob("*.safetensors")):
        try:
            steps[file] = _sound_step(file)
        except (OSError, CheckpointError) as error:
            damaged.append(f"{file} ({error})")
    steps = {file: step for file, step in steps.items() if step is not None}
    newest = max(steps, key=lambda file: (steps[file], file), default=None)
    if damaged and newest is None:
        raise CheckpointError(
            f"A run goes on from a sound checkpoint, got only damaged ones: {'; '.join(damaged)}; "
            "expected a whole one: put a copy there, or remove them to start anew."
        )
    if damaged:
        warnings.warn(
            f"Damaged checkpoints are passed over, got {'; '.join(damaged)}; the newest sound one "
            f"is {newest}: remove the others, or replace them by copies.",
            RuntimeWarning, stacklevel=2,
        )
    return newest


def check_keep_last(keep_last):
    if keep_last is not None and not (isinstance(keep_last, int) and keep_last >= 1):
        raise ValueError(
            f"The last checkpoint stays, got keep_last={keep_last} expected >= 1, or None for all."
        )


def check_format(path, manifest):
    """Refuses a file of a newer format, whose arrays might mean something else."""
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"A checkpoint is read by the fbprop that wrote it or a newer one, got {path} in "
            f"format {manifest['format']} expected at most {FORMAT}: install fbprop "
            f"{manifest['versions']['fbprop']}."
        )


def _opened(path, contents):
    """A checkpoint's manifest and its leaves, `WholeFile` or `Parts`."""
    manifest = _manifest(path, contents.metadata)
    if "parts" in manifest:
        return manifest, Parts(path, manifest["parts"])
    return manifest, WholeFile(contents)


def _manifest(path, metadata):
    try:
        manifest = json.loads(metadata["fbprop"])
        if isinstance(manifest["format"], int) and (
            manifest["format"] > FORMAT or _is_whole(manifest)
        ):
            return manifest
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(
        f"A checkpoint has a manifest, got {path} without; expected a file written by "
        "fbprop.train.save: read other safetensors files with fbprop.train.load_tensors."
    )


def _is_whole(manifest) -> bool:
    """Whether a manifest of this format has all its parts."""
    kinds = {"versions": dict, "step": int, "leaves": list, "keys": dict, "metadata": dict}
    return all(isinstance(manifest[name], kind) for name, kind in kinds.items()) and all(
        isinstance(e["path"], str) and isinstance(e["dtype"], str)
        and all(isinstance(n, int) for n in e["shape"]) for e in manifest["leaves"]
    )


def _check_stored(path, leaves, stored):
    """Every leaf in the manifest is there, and has as many bytes."""
    for entry in leaves:
        name, dtype = entry["path"], _dtype(entry)
        if name in stored.names():
            # A key's size depends on its implementation; JAX checks it.
            size = dtype and math.prod(entry["shape"]) * dtype.itemsize
            if size is None or size == stored.form(name, dtype)[1]:
                continue
        raise CheckpointError(
            f"A checkpoint holds the arrays that its manifest lists, got {_say(entry)} in {path} "
            "without the bytes for it; expected a file as fbprop.train.save writes it: use "
            "another one."
        )


def _dtype(entry):
    """A leaf's dtype; None for random keys, whose numbers are stored."""
    return None if entry["dtype"].startswith("key<") else jnp.dtype(entry["dtype"])


@functools.cache
def _version(package):
    try:
        return installed.version(package)
    except installed.PackageNotFoundError:
        return "not installed as a package"


def _step(state) -> int:
    return int(getattr(state, "step", 0))


def _is_key(x) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x):
    """A leaf as an array that NumPy knows: a random key as its uint32 numbers."""
    return jax.random.key_data(x) if _is_key(x) else x


def _is_array(x) -> bool:
    return hasattr(x, "dtype")


def _description(name, leaf) -> dict:
    """A leaf's path, shape and dtype; ``leaf`` may be abstract."""
    leaf = leaf if _is_array(leaf) else np.asarray(leaf)
    return {"path": name, "shape": [*leaf.shape], "dtype": str(leaf.dtype)}


def _check_same(path, got, like):
    expected = [_description(name, leaf) for name, leaf in named_leaves(like).items()]
    for mine, theirs in itertools.zip_longest(got, expected):
        if mine != theirs:
            raise CheckpointError(
                f"A checkpoint fits the state it is restored into, got {_say(mine)} in {path} "
                f"expected {_say(theirs)}: build the same model and optimiser, or use another file."
            )


def _say(entry) -> str:
    if entry is None:
        return "no further leaf"
    return f"{entry['path']!r} of {entry['dtype']}[{','.join(map(str, entry['shape']))}]"


def _leaf(stored, entry, implementation, like):
    """The saved leaf as what ``like`` is, where it is; a copy, because steps donate it."""
    name, dtype = entry["path"], _dtype(entry)
    shape, _ = stored.form(name, dtype)
    region = lambda index: stored.region(name, dtype, index)
    if implementation is None and not isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        whole = region((slice(None),) * len(shape))
        return whole if _is_array(like) else whole.item()
    if getattr(like, "committed", isinstance(like, jax.ShapeDtypeStruct)) and like.sharding:
        leaf = jax.make_array_from_callback(shape, like.sharding, region)
    else:
        leaf = jnp.array(region((slice(None),) * len(shape)))
    return leaf if implementation is None else jax.random.wrap_key_data(leaf, impl=implementation)


def _sound_step(file) -> int | None:
    """The step in a checkpoint whose every byte is right; None if it is no checkpoint of ours."""
    if not file.is_file():
        raise OSError("no regular file")  # a directory, or a link to nothing
    contents = read(file, mapped=True)
    if "fbprop" not in contents.metadata:
        return None
    manifest, stored = _opened(file, contents)
    if isinstance(stored, Parts):
        stored.check()
    return manifest["step"]


def _remove_older(path, keep_last, keep):
    pattern = re.sub(r"\d+", r"\\d+", re.escape(path.name))
    own = [f for f in path.parent.iterdir() if f != path and re.fullmatch(pattern, f.name)]
    steps = {file: step for file in own if (step := _step_of(file)) is not None}
    kept = {pathlib.Path(file) for file in keep}
    for file in sorted(steps, key=steps.get, reverse=True)[keep_last - 1:]:
        if file not in kept:
            file.unlink()
    remove_orphans(path.parent)


def _step_of(file) -> int | None:
    """The step in a file's manifest; None if it has none that can be read."""
    try:
        return read_manifest(file)["step"]
    except (OSError, CheckpointError):
        return None
