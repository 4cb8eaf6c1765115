"""Downloads from a server of our own: whole, resumed, cut off, wrong, absent."""

import hashlib
import http.server
import threading

import pytest

from fbprop import data

CONTENT = bytes(range(251)) * 2003  # 502,753 bytes: two chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """/file serves ranges, /plain does not, /wrong has one other byte, /cut ends half-way."""

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Range")))
        content = b"!" + CONTENT[1:] if self.path == "/wrong" else CONTENT
        asked = self.headers.get("Range")
        start = int(asked[6:-1]) if asked and self.path in ("/file", "/wrong", "/cut") else 0
        if self.path == "/nothing":
            return self.send_error(404)
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        self.wfile.write(rest[: len(rest) // 2] if self.path == "/cut" else rest)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def part_of(file):
    return file.with_name(file.name + ".part")


def test_a_file_arrives_whole_and_is_fetched_once(server, tmp_path):
    file = tmp_path / "new" / "folder" / "a.bin"
    assert data.download(f"{server.url}/file", file, sha256=SHA256) == file
    assert file.read_bytes() == CONTENT
    data.download(f"{server.url}/file", str(file), sha256=SHA256.upper())
    assert server.seen == [("/file", None)]
    assert [f.name for f in file.parent.iterdir()] == ["a.bin"]


def test_a_broken_connection_is_resumed_where_it_broke(server, tmp_path):
    file, half = tmp_path / "a.bin", len(CONTENT) // 2
    with pytest.raises(data.DownloadError, match=f"got {half} bytes expected {len(CONTENT)}"):
        data.download(f"{server.url}/cut", file, sha256=SHA256)
    assert not file.exists()
    assert part_of(file).read_bytes() == CONTENT[:half]
    data.download(f"{server.url}/file", file, sha256=SHA256)
    assert file.read_bytes() == CONTENT
    assert server.seen[1:] == [("/file", f"bytes={half}-")]
    assert not part_of(file).exists()


def test_a_server_without_ranges_begins_anew(server, tmp_path):
    file = tmp_path / "a.bin"
    part_of(file).write_bytes(b"?" * 7)  # its bytes are not used, or the checksum would be wrong
    data.download(f"{server.url}/plain", file, sha256=SHA256)
    assert file.read_bytes() == CONTENT
    assert server.seen == [("/plain", "bytes=7-")]


@pytest.mark.parametrize("extra", [0, 5])
def test_a_part_file_as_long_as_the_file_or_longer(server, tmp_path, extra):
    file = tmp_path / "a.bin"
    part_of(file).write_bytes(CONTENT + b"?" * extra)
    data.download(f"{server.url}/file", file, sha256=SHA256)
    assert file.read_bytes() == CONTENT
    asked = [f"bytes={len(CONTENT) + extra}-"] + ([None] if extra else [])
    assert server.seen == [("/file", a) for a in asked]


def test_a_wrong_file_is_not_kept(server, tmp_path):
    file = tmp_path / "a.bin"
    with pytest.raises(data.DownloadError, match=rf"got {'[0-9a-f]' * 64} expected {SHA256}"):
        data.download(f"{server.url}/wrong", file, sha256=SHA256)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_beginning_is_not_gone_on_with_twice(server, tmp_path):
    file = tmp_path / "a.bin"
    part_of(file).write_bytes(b"?" * 7)
    with pytest.raises(data.DownloadError, match="nothing of it was kept"):
        data.download(f"{server.url}/file", file, sha256=SHA256)
    data.download(f"{server.url}/file", file, sha256=SHA256)
    assert file.read_bytes() == CONTENT


def test_another_file_of_that_name_is_left_alone(server, tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"mine")
    with pytest.raises(data.DownloadError, match="remove it to download it anew"):
        data.download(f"{server.url}/file", file, sha256=SHA256)
    assert file.read_bytes() == b"mine"
    assert server.seen == []


def test_what_is_not_there(server, tmp_path):
    file = tmp_path / "a.bin"
    with pytest.raises(data.DownloadError, match=r"got HTTP Error 404: Not Found expected http"):
        data.download(f"{server.url}/nothing", file, sha256=SHA256)
    closed = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    closed.server_close()
    with pytest.raises(data.DownloadError, match="needs a connection, got .*refused"):
        data.download(f"http://127.0.0.1:{closed.server_port}/file", file, sha256=SHA256)
    with pytest.raises(ValueError, match="64 hexadecimal digits, got 'abc'"):
        data.download(f"{server.url}/file", file, sha256="abc")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_when_wanted(server, tmp_path, capsys):
    data.download(f"{server.url}/file", tmp_path / "a.bin", sha256=SHA256, progress=True)
    assert capsys.readouterr().err.endswith("\ra.bin  0.5 of 0.5 MB\n")
    data.download(f"{server.url}/file", tmp_path / "b.bin", sha256=SHA256)
    assert capsys.readouterr().err == ""  # no terminal
