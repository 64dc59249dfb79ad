"""What several test files use. Each test must leave files only below tmp_path."""

import os

# Before torch, OpenCV or BLAS are loaded, and for the processes that tests start: small tensors on many threads are
# slower than on two, and several test processes must not fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait take the cores from others

import hashlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Times on a shared machine say nothing; no example database is left in the repository.
settings.register_profile("repository", deadline=None, database=None)
settings.load_profile("repository")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, or one of two processes would wait for the other in the end."""
    items.sort(key=lambda item: item.path.parent.name != "tests")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with the published code's numbers, ground truth and photographs."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"NOT CHECKED: needs {folder}, which holds the published code's numbers and real photographs")
    return folder


class FileServer(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes) on a free local port, with the habits and faults that a test switches on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True  # answer Range requests with 206
        self.validators = {"ETag"}  # any of ETag, weak (an ETag that is), Last-Modified
        self.repeat_validators = True  # send them with 206 too
        self.sizes = True  # send Content-Length
        self.chunked = False
        self.break_after: int | None = None  # drop the connection after so many bytes of a body
        self.pause = 0.0  # seconds between blocks of 64 KiB
        self.asked: list[tuple[str, str | None]] = []  # path and Range header of every request
        self.answered: list[int] = []  # the status codes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_GET(self) -> None:
        server = self.server
        asked_range = self.headers.get("Range")
        server.asked.append((self.path, asked_range))
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        digest = hashlib.sha256(body).hexdigest()
        seconds = int(digest, 16) % 60  # a stand-in for the time of change, which differs between contents
        known = {
            "ETag": ("ETag", f'"{digest}"'),
            "weak": ("ETag", f'W/"{digest}"'),
            "Last-Modified": ("Last-Modified", f"Mon, 01 Jan 2024 00:00:{seconds:02d} GMT"),
        }
        fit_for_if_range = [known[kind][1] for kind in server.validators - {"weak"}]
        start = 0
        if asked_range and server.ranges and self.headers.get("If-Range") in (None, *fit_for_if_range):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked_range)[1])
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if not start or server.repeat_validators:
            for kind in server.validators:
                self.send_header(*known[kind])
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif server.sizes:
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Connection", "close")
        self.end_headers()
        self._send(body[start:])

    def _send(self, body: bytes) -> None:
        end = len(body) if self.server.break_after is None else min(len(body), self.server.break_after)
        for at in range(0, end, 1 << 16):
            block = body[at : min(end, at + (1 << 16))]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if self.server.chunked else block)
            time.sleep(self.server.pause)
        if self.server.chunked and end == len(body):
            self.wfile.write(b"0\r\n\r\n")

    def log_request(self, code="-", size="-") -> None:
        self.server.answered.append(int(code))

    def log_message(self, *args) -> None:
        """Nothing on stderr."""


@pytest.fixture
def file_server(monkeypatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
