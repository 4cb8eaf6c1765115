"""Recordings in uncompressed WAV files."""

from __future__ import annotations

import os
import wave

import numpy as np


def read_wav(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """The samples of a WAV file of 16 bits a sample, and how many there are in a second.

    Args:
      path: the file; uncompressed PCM.

    Returns:
      ``(samples, rate)``, int16 [n] of one channel, [n, channels] of more.

    Raises:
      ValueError: no WAV file, or another format, or a file that is cut off.

    Example:
      >>> import pathlib, tempfile, wave
      >>> from fbprop import data
      >>> file = str(pathlib.Path(tempfile.mkdtemp()) / "a.wav")
      >>> with wave.open(file, "wb") as out:
      ...     out.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
      ...     out.writeframes(bytes([1, 0, 0, 1, 255, 255]))
      >>> samples, rate = data.read_wav(file)
      >>> samples.tolist(), rate
      ([1, 256, -1], 8000)
    """
    try:
        with wave.open(os.fspath(path)) as stored:
            form, content = stored.getparams(), stored.readframes(stored.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"A recording is an uncompressed WAV file, got {str(error) or 'an early end'} expected "
            f"RIFF, WAVE and PCM, in {path}."
        ) from None
    expected = form.nframes * form.nchannels * 2
    if form.sampwidth != 2 or len(content) != expected:
        raise ValueError(
            f"A WAV file has the 16-bit samples that its header announces, got {len(content)} "
            f"bytes of {8 * form.sampwidth}-bit samples expected {expected} of 16, in {path}: "
            "convert it, or fetch it again."
        )
    samples = np.frombuffer(content, "<i2").astype(np.int16)
    shape = (-1,) if form.nchannels == 1 else (-1, form.nchannels)
    return samples.reshape(shape), form.framerate
