"""Downloads from a server on this machine: a file appears whole and right, or not at all."""

import hashlib
import http.server
import threading

import pytest

from keras_sd.errors import UserError
from keras_sd.files.download import download, file_hash

CONTENT = bytes(range(256)) * 5000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, all but its end, or nothing."""

    def do_GET(self):
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/whole" else CONTENT[:-1000])

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_written_with_its_folder(tmp_path, address):
    path = tmp_path / "new" / "folder" / "file"
    download(f"{address}/whole", path, hashlib.sha256(CONTENT).hexdigest(), "look elsewhere")
    assert path.read_bytes() == CONTENT and file_hash(path) == hashlib.sha256(CONTENT).hexdigest()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "sha256", "told"),
    [
        ("whole", "0" * 64, "sent a damaged file or another one"),
        ("cut", None, "(sent a damaged file|could not be downloaded)"),
        ("missing", None, "could not be downloaded .*Not Found"),
    ],
)
def test_a_fault_is_one_line_and_leaves_no_file(tmp_path, address, place, sha256, told):
    sha256 = sha256 or hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(UserError, match=f"{told}.*; look elsewhere$") as caught:
        download(f"{address}/{place}", tmp_path / "file", sha256, "look elsewhere")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_proxies_are_those_of_the_environment_now(tmp_path, address, monkeypatch):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with monkeypatch.context() as environment:
        environment.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
        with pytest.raises(UserError, match="could not be downloaded"):
            download(f"{address}/whole", tmp_path / "file", sha256, "look elsewhere")
    download(f"{address}/whole", tmp_path / "file", sha256, "look elsewhere")


def test_no_connection_and_no_place(tmp_path, address):
    # Nothing listens at port 9.
    with pytest.raises(
        UserError, match="file: not found, and http://127.0.0.1:9/file could not be downloaded"
    ):
        download("http://127.0.0.1:9/file", tmp_path / "file", "0" * 64, "look elsewhere")
    (tmp_path / "place").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        download(f"{address}/whole", tmp_path / "place" / "file", "0" * 64, "look elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
