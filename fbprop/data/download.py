"""Files from the network: only when asked, checked, resumed where a try before broke off."""

from __future__ import annotations

import hashlib
import http.client
import os
import pathlib
import re
import sys
import time
import urllib.error
import urllib.request

_CHUNK = 1 << 18  # bytes at a time: 0.2 s of a slow line of 1 MB/s
_INTERVAL = 0.2  # seconds between updates of the progress line


class DownloadError(OSError):
    """A file could not be had, or is not what was expected."""


def download(url: str, file: str | os.PathLike, *, sha256: str, progress: bool | None = None,
             timeout: float = 30.0) -> pathlib.Path:
    """Fetches ``url`` into ``file``, unless it is there already.

    The bytes go to ``file`` + ".part" first, and take their name when their checksum is right. So
    ``file`` is whole or absent. What a broken connection leaves in the part file is gone on with
    by the next call, if the server serves ranges; if not, from the start.

    Args:
      url: http, https or file.
      file: where to; missing directories are made.
      sha256: the SHA-256 of the whole file, 64 hexadecimal digits.
      progress: whether to show progress on standard error; None: if that is a terminal.
      timeout: seconds to wait for a silent server.

    Returns:
      The path.

    Raises:
      DownloadError: no such file or server, the connection ended early (the part is kept), a
        wrong checksum (nothing is kept), or a ``file`` that exists and is another one.
      ValueError: ``sha256`` is no checksum, or ``url`` no address.

    Example:
      >>> import hashlib, pathlib, tempfile
      >>> from fbprop import data
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "a").write_bytes(b"abc")
      >>> checksum = hashlib.sha256(b"abc").hexdigest()
      >>> data.download((folder / "a").as_uri(), folder / "b", sha256=checksum).read_bytes()
      b'abc'
    """
    if not re.match(r"(https?|file):", str(url)):
        raise ValueError(
            f"A download has an address, got url={url!r} expected http://..., https://... or "
            "file://..."
        )
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(
            f"A SHA-256 checksum is 64 hexadecimal digits, got {sha256!r}; expected what "
            "`sha256sum` prints for the file."
        )
    file = pathlib.Path(file)
    if file.exists():
        _check(file, sha256, "remove it to download it anew")
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    _fetch(url, part, progress, timeout)
    try:
        _check(part, sha256, "nothing of it was kept: try again, or look whether the file changed")
    except DownloadError:
        part.unlink()
        raise
    part.replace(file)
    return file


def _fetch(url, part, progress, timeout):
    """Completes the part file, to the length the server announces."""
    have = part.stat().st_size if part.exists() else 0
    try:
        got, total = _receive(url, part, have, progress, timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: nothing lies beyond what we have
            raise DownloadError(f"A server serves files, got {error} expected {url}.") from None
        if error.headers.get("Content-Range") != f"bytes */{have}":
            part.unlink()  # longer than the file: of another version
            _fetch(url, part, progress, timeout)
        return
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(
            f"Downloading needs a connection, got {reason!s} expected {url}: what had come is "
            "kept, the next call goes on from there."
        ) from None
    if total is not None and got < total:
        raise DownloadError(
            f"A download has the length that its server announces, got {got} bytes expected "
            f"{total} of {url}: the next call goes on from there."
        )


def _receive(url, part, have, progress, timeout) -> tuple[int, int | None]:
    """One request; the part file's length after it, and the whole file's if that is known."""
    with _open(url, have, timeout) as response:
        start, total = _range(response, have)
        with part.open("r+b" if start else "wb") as out:
            out.seek(start)
            got = _copy(response, out, start, total, _Line(part.stem, total, progress))
            out.flush()
            os.fsync(out.fileno())
    return got, total


def _open(url, have, timeout):
    headers = {"User-Agent": "fbprop", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)


def _range(response, have) -> tuple[int, int | None]:
    """Where the response's bytes begin in the file, and the file's length if it says so."""
    matched = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range") or "")
    if response.status == 206 and matched and int(matched[1]) == have:
        return have, int(matched[2])
    length = response.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def _copy(response, out, done, total, line) -> int:
    """Bytes in the file after all that came was written."""
    try:
        while chunk := response.read(_CHUNK):
            out.write(chunk)
            done += len(chunk)
            line.update(done)
    finally:
        line.close(done)
    return done


def _check(file, sha256, remedy):
    with file.open("rb") as stored:
        got = hashlib.file_digest(stored, "sha256").hexdigest()
    if got != sha256.lower():
        raise DownloadError(
            f"{file.name.removesuffix('.part')} is known by its SHA-256, got {got} expected "
            f"{sha256.lower()}: {remedy}."
        )


class _Line:
    """One updating line on standard error: megabytes so far."""

    def __init__(self, name: str, total: int | None, show: bool | None):
        self.name, self.total, self.shown = name, total, 0.0
        self.visible = sys.stderr.isatty() if show is None else show

    def update(self, done: int) -> None:
        if self.visible and time.monotonic() - self.shown >= _INTERVAL:
            self.shown = time.monotonic()
            of = "" if self.total is None else f" of {self.total / 1e6:.1f}"
            sys.stderr.write(f"\r{self.name}  {done / 1e6:.1f}{of} MB")
            sys.stderr.flush()

    def close(self, done: int) -> None:
        self.shown = 0.0
        self.update(done)
        if self.visible:
            sys.stderr.write("\n")
