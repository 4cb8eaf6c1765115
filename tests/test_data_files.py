"""Data sets read from files: IDX, Fashion-MNIST; the embedded plays."""

import functools
import gzip
import hashlib
import http.server
import pathlib
import struct
import threading
import wave

import chex
import numpy as np
import pytest

from fbprop import data
from fbprop.data import fashion

CODES = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}


def idx(array):
    """The bytes of an IDX file."""
    head = bytes([0, 0, CODES[array.dtype.name], array.ndim])
    big = array.astype(array.dtype.newbyteorder(">"))
    return head + struct.pack(f">{array.ndim}I", *array.shape) + big.tobytes()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_give_their_array(tmp_path, dtype, packed):
    array = (np.arange(30).reshape(2, 3, 5) * 4 - 7).astype(dtype)
    file = tmp_path / "file"  # its name says nothing
    file.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    read = data.read_idx(str(file))
    assert read.dtype == np.dtype(dtype)  # of this machine's byte order
    chex.assert_trees_all_equal(read, array)
    read[0] = 0  # and one's own


def test_idx_files_without_elements_or_axes(tmp_path):
    for array in (np.zeros((0, 3), np.uint8), np.array(7, np.int16)):
        (tmp_path / "a").write_bytes(idx(array))
        chex.assert_trees_all_equal(data.read_idx(tmp_path / "a"), array)


WHOLE = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
PACKED = gzip.compress(WHOLE, mtime=0)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "got  expected e.g. 00 00 08 03"),
    (b"PNG" + WHOLE[3:], "got 50 4e 47 02 expected e.g. 00 00 08 03"),
    (b"\0\0\x0a" + WHOLE[3:], "got 00 00 0a 02 expected"),
    (WHOLE[:9], "got 9 bytes expected 12 for 2 axes.* cut off"),
    (WHOLE[:-1], r"got 17 bytes expected 18 for uint8 \[2, 3\].* damaged"),
    (WHOLE + b"?", r"got 19 bytes expected 18 for uint8 \[2, 3\]"),
    (PACKED[:-9], "expected a whole gzip file"),
    (PACKED[:-8] + b"?" * 8, "got CRC check failed expected a whole gzip file"),
], ids=range(8))
def test_damaged_idx_files_are_refused(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_idx(tmp_path / "a")


def write_fashion(folder, packed=True, labels=(3, 9, 0, 1, 2)):
    folder.mkdir(exist_ok=True)
    for part, n in (("train", 5), ("t10k", 2)):
        image = np.arange(n * 784).reshape(n, 28, 28).astype(np.uint8)
        for kind, array in (("images-idx3", image), ("labels-idx1", np.uint8(labels[:n]))):
            name = f"{part}-{kind}-ubyte"
            (folder / (name + ".gz" * packed)).write_bytes(
                gzip.compress(idx(array), mtime=0) if packed else idx(array)
            )


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_is_read_from_its_four_files(tmp_path, packed):
    write_fashion(tmp_path, packed)
    train, test = data.fashion_mnist(tmp_path)
    for part, n in ((train, 5), (test, 2)):
        assert {k: (v.shape, v.dtype.name) for k, v in part.items()} == {
            "image": ((n, 28, 28, 1), "float32"), "label": ((n,), "int32"),
        }
    assert train["label"].tolist() == [3, 9, 0, 1, 2]
    assert len(fashion.CLASSES) == 10
    chex.assert_trees_all_close(train["image"].ravel()[:257] * 255, np.arange(257) % 256 * 1.0,
                                rtol=1e-6)


def test_fashion_mnist_says_what_is_wrong(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="got no t10k-labels-idx1-ubyte expected it, or"):
        data.fashion_mnist(tmp_path)
    write_fashion(tmp_path, labels=(3, 10, 0, 1, 2))
    with pytest.raises(ValueError, match=r"got train pictures \[5, 28, 28\] and labels \[5\] up to"
                                         " 10; expected"):
        data.fashion_mnist(tmp_path)
    write_fashion(tmp_path, labels=(1, 2, 3))
    with pytest.raises(ValueError, match=r"pictures \[5, 28, 28\] and labels \[3\]"):
        data.fashion_mnist(tmp_path)
    with pytest.raises(ValueError, match="got folder=None with download=True; expected a folder"):
        data.fashion_mnist(download=True)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server with small files in the place of the published ones; its folder and theirs."""
    served = tmp_path / "served"
    write_fashion(served)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(fashion, "URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(fashion, "_SHA256", {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in served.iterdir()
        })
        yield served
        server.shutdown()
        thread.join()


def test_fashion_mnist_is_downloaded_once(tmp_path, published):
    folder = tmp_path / "clothes"
    first = data.fashion_mnist(folder, download=True)
    chex.assert_trees_all_equal(first, data.fashion_mnist(published))
    for file in published.iterdir():
        file.unlink()
    chex.assert_trees_all_equal(first, data.fashion_mnist(folder, download=True))


def test_fashion_mnist_refuses_what_is_not_the_published_file(tmp_path, published):
    file = published / "train-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes() + b"?")
    with pytest.raises(data.DownloadError, match="train-labels-idx1-ubyte.gz is known by its SHA"):
        data.fashion_mnist(tmp_path / "clothes", download=True)


def test_the_published_checksums_are_sha256_of_four_files():
    assert sorted(fashion._SHA256) == [
        f"{part}-{kind}-ubyte.gz" for part in ("t10k", "train")
        for kind in ("images-idx3", "labels-idx1")
    ]
    assert all(len(bytes.fromhex(s)) == 32 for s in fashion._SHA256.values())


def test_pgm_files_give_their_grey_levels(tmp_path):
    file, pixels = tmp_path / "a.pgm", np.arange(9, 15, dtype=np.uint8)  # 9 to 13 are white space
    for head in (b"P5\n3 2\n255\n", b"P5 # made by hand\n3\t2\n# levels\n255\n"):
        file.write_bytes(head + pixels.tobytes())
        chex.assert_trees_all_equal(data.read_pgm(file), pixels.reshape(2, 3))
    file.write_bytes(b"P5 3 1 256 " + bytes([1, 0, 0, 2, 0, 3]))
    read = data.read_pgm(str(file))
    assert (read.tolist(), read.dtype) == ([[256, 2, 3]], np.uint16)


@pytest.mark.parametrize(("content", "message"), [
    (b"P2 1 1 255 7", r"got b'P2 1 1 255 7' expected e.g. b'P5 92 112 255 '"),
    (b"P5 1 1 70000 7", "largest level"),
    (b"P5 3 2 255 12345", "got 5 bytes expected 6 for 3 x 2.* damaged"),
    (b"P5 3 2 255 1234567", "got 7 bytes expected 6 for 3 x 2"),
    (b"P5 3 1 256 12345", "got 5 bytes expected 6 for 3 x 1"),
])
def test_damaged_pgm_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.pgm").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_pgm(tmp_path / "a.pgm")


def write_wav(file, samples, channels=1, width=2):
    with wave.open(str(file), "wb") as out:
        out.setparams((channels, width, 11025, 0, "NONE", "not compressed"))
        out.writeframes(samples.astype("<i2").tobytes())
    return file


@pytest.mark.parametrize("shape", [(7,), (5, 2)])
def test_wav_files_give_their_samples(tmp_path, shape):
    samples = (np.arange(np.prod(shape)) * 4001 - 17000).astype(np.int16).reshape(shape)
    file = write_wav(tmp_path / "a.wav", samples, channels=samples[0].size)
    read, rate = data.read_wav(file)
    assert (read.dtype, rate) == (np.int16, 11025)
    chex.assert_trees_all_equal(read, samples)


def test_damaged_wav_files_are_refused(tmp_path):
    whole = write_wav(tmp_path / "a.wav", np.arange(7))
    cut = tmp_path / "cut.wav"
    for kept, message in ((-2, "got 12 bytes of 16-bit samples expected 14"), (20, "uncompressed")):
        cut.write_bytes(whole.read_bytes()[:kept])
        with pytest.raises(ValueError, match=message):
            data.read_wav(cut)
    with pytest.raises(ValueError, match="of 8-bit samples expected .* of 16"):
        data.read_wav(write_wav(tmp_path / "b.wav", np.arange(4), width=1))
    cut.write_bytes(b"OggS" + bytes(100))
    with pytest.raises(ValueError, match="expected RIFF, WAVE and PCM"):
        data.read_wav(cut)


def test_shakespeare_is_four_plays():
    text = data.shakespeare()
    assert len(text) == 509571
    assert text.isascii()
    assert len(set(text)) == 65
    assert not set("*_#\\") & set(text)
    plays = ["Hamlet", "Macbeth", "Romeo and Juliet", "A Midsummer Night's Dream"]
    starts = [text.index(f"{play}\n\nACT I\n") for play in plays]
    assert starts == sorted(starts)
    assert text.startswith("Hamlet\n")
    assert text.endswith("And Robin shall restore amends.\n")
    assert "\n\nHAMLET\nTo be, or not to be: that is the question:\n" in text


def test_the_embedded_text_is_small():
    file = pathlib.Path(fashion.__file__).with_name("shakespeare.txt.gz")
    assert file.stat().st_size < 1_000_000
