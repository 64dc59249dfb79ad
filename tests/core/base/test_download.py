"""Downloads against a real local server that breaks off, changes its files, or does not know ranges."""

import contextlib
import hashlib
import io
import re
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from core.base.download import DownloadError, _Redirects, cache_path, download, fetch, local_path, main

ROOT = Path(__file__).resolve().parents[3]


def content(seed: int, size: int = 300_000) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def broken_off(file_server, tmp_path):
    """A server with /a.pyth, and the partial file that a connection lost after 100,000 bytes left."""
    file_server.files["/a.pyth"] = content(1)

    def begin() -> Path:
        file_server.break_after = 100_000
        target = tmp_path / "a.pyth"
        with pytest.raises(DownloadError, match="/a.pyth: the connection ended after 100000 of"):
            download(f"{file_server.url}/a.pyth", target)
        file_server.break_after = None
        file_server.asked.clear()
        file_server.answered.clear()
        assert not target.exists()
        assert (tmp_path / "a.pyth.part").stat().st_size == 100_000
        return target

    return begin


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_is_not_fetched_twice(file_server, tmp_path):
    file_server.files["/x/a.pyth"] = content(1)
    path = fetch(f"{file_server.url}/x/a.pyth", tmp_path)
    assert path.name == "a.pyth"
    assert path.read_bytes() == content(1)
    assert names(path.parent) == ["a.pyth"]
    assert fetch(f"{file_server.url}/x/a.pyth", tmp_path) == path
    assert len(file_server.asked) == 1


@pytest.mark.parametrize(
    "validators",
    [{"ETag"}, {"Last-Modified"}, {"weak", "Last-Modified"}],
    ids=["ETag", "Last-Modified", "weak ETag"],
)
def test_a_broken_download_goes_on_where_it_stopped(file_server, broken_off, validators):
    file_server.validators = validators
    target = broken_off()
    download(f"{file_server.url}/a.pyth", target)
    assert target.read_bytes() == content(1)
    assert file_server.asked == [("/a.pyth", "bytes=100000-")]
    assert file_server.answered == [206]
    assert names(target.parent) == ["a.pyth"]


@pytest.mark.parametrize("validator", ["ETag", "Last-Modified"])
@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("size", [300_000, 50_000, 500_000])
def test_a_file_that_changed_meanwhile_is_not_mixed(file_server, broken_off, validator, repeated, size):
    file_server.validators = {validator}
    file_server.repeat_validators = repeated
    target = broken_off()
    file_server.files["/a.pyth"] = content(2, size)
    download(f"{file_server.url}/a.pyth", target)
    assert target.read_bytes() == content(2, size)


@pytest.mark.parametrize("validators", [set(), {"weak"}])
@pytest.mark.parametrize("size", [50_000, 300_000, 500_000])
def test_what_nothing_tells_from_another_version_is_fetched_anew(file_server, broken_off, size, validators):
    """Another version may have the same size."""
    file_server.validators = validators
    target = broken_off()
    file_server.files["/a.pyth"] = content(2, size)
    download(f"{file_server.url}/a.pyth", target)
    assert target.read_bytes() == content(2, size)
    assert file_server.asked == [("/a.pyth", None)]


@pytest.mark.parametrize(
    "memo",
    [
        *(b"", b"[" * 100_000, b"[1, 2]", b'{"validator": "a\\nb", "size": []}'),
        *(b'{"validator": 3, "size": 300000}', b'{"validator": "", "size": 300000}'),
    ],
)
def test_a_damaged_memo_is_as_none(file_server, broken_off, memo):
    target = broken_off()
    target.with_name("a.pyth.part.json").write_bytes(memo)
    download(f"{file_server.url}/a.pyth", target)
    assert target.read_bytes() == content(1)


def test_a_server_that_ignores_if_range_is_found_out_by_its_etag(file_server, broken_off, monkeypatch):
    target = broken_off()
    file_server.files["/a.pyth"] = content(2)
    handler = file_server.RequestHandlerClass
    honest = handler.do_GET

    def forgetful(self):
        del self.headers["If-Range"]
        honest(self)

    monkeypatch.setattr(handler, "do_GET", forgetful)
    download(f"{file_server.url}/a.pyth", target)
    assert target.read_bytes() == content(2)
    assert [asked for _, asked in file_server.asked] == ["bytes=100000-", None]


def test_a_server_without_ranges_starts_again(file_server, broken_off):
    file_server.ranges = False
    target = broken_off()
    download(f"{file_server.url}/a.pyth", target)
    assert target.read_bytes() == content(1)


def test_a_part_without_its_memo_is_not_trusted(file_server, tmp_path):
    file_server.files["/a.pyth"] = content(1)
    (tmp_path / "a.pyth.part").write_bytes(b"something else")
    download(f"{file_server.url}/a.pyth", tmp_path / "a.pyth")
    assert (tmp_path / "a.pyth").read_bytes() == content(1)


def test_a_part_that_is_complete_needs_only_its_name(file_server, broken_off):
    target = broken_off()
    target.with_name("a.pyth.part").write_bytes(content(1))
    download(f"{file_server.url}/a.pyth", target)
    assert target.read_bytes() == content(1)
    assert file_server.asked == []


def test_a_part_longer_than_the_file_starts_again(file_server, broken_off):
    target = broken_off()
    target.with_name("a.pyth.part").write_bytes(content(1) + b"more")
    download(f"{file_server.url}/a.pyth", target)
    assert target.read_bytes() == content(1)


def test_chunked_answers_are_accepted_and_their_break_noticed(file_server, tmp_path):
    file_server.files["/a.pyth"] = content(1, 3 << 20)
    file_server.chunked = True
    file_server.validators = set()
    file_server.break_after = 2_000_000
    with pytest.raises(DownloadError, match="a.pyth"):
        download(f"{file_server.url}/a.pyth", tmp_path / "a.pyth")
    assert names(tmp_path) == ["a.pyth.part", "a.pyth.part.json"]
    # Neither size nor ETag nor date is known: what has arrived may be of another file, so it starts again.
    file_server.files["/a.pyth"] = content(2, 3 << 20)
    file_server.break_after = None
    download(f"{file_server.url}/a.pyth", tmp_path / "a.pyth")
    assert (tmp_path / "a.pyth").read_bytes() == content(2, 3 << 20)


def test_an_answer_of_unknown_size_needs_a_checksum(file_server, tmp_path):
    file_server.files["/a.pyth"] = content(1)
    file_server.sizes = False
    url, target = f"{file_server.url}/a.pyth", tmp_path / "a.pyth"
    with pytest.raises(DownloadError, match="size"):
        download(url, target)
    assert names(tmp_path) == []
    download(url, target, sha256=hashlib.sha256(content(1)).hexdigest())
    assert target.read_bytes() == content(1)


def test_a_wrong_checksum_keeps_nothing_and_an_existing_file_is_not_replaced(file_server, tmp_path):
    file_server.files["/a.pyth"] = content(1)
    url, target = f"{file_server.url}/a.pyth", tmp_path / "a.pyth"
    with pytest.raises(DownloadError, match="sha256"):
        download(url, target, sha256="0" * 64)
    assert names(tmp_path) == []
    target.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="another sha256"):
        download(url, target, sha256="0" * 64)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/a.pyth",
        "http:///a.pyth",
        "http://host:port/a.pyth",
        "http://[::1/a.pyth",
        "http://127.0.0.1:9/",
        "http://127.0.0.1:9/..",
        "http://127.0.0.1:1/a.pyth",  # nobody listens there
        "http://a..b/a.pyth",
    ],
)
def test_an_unusable_address_gives_one_line_with_the_address(tmp_path, monkeypatch, url):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DownloadError) as raised:
        local_path(url, tmp_path)
    assert str(raised.value).startswith(f"{url}: ")
    assert "\n" not in str(raised.value)


def test_a_missing_file_gives_one_line_and_leaves_nothing(file_server, tmp_path):
    with pytest.raises(DownloadError, match="none.pyth: the server answers 404 Not Found"):
        download(f"{file_server.url}/none.pyth", tmp_path / "none.pyth")
    assert names(tmp_path) == []


def test_a_cache_that_cannot_be_written_gives_one_line(file_server, tmp_path):
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    with pytest.raises(DownloadError, match="a.pyth"):
        fetch(f"{file_server.url}/a.pyth", tmp_path / "cache")


def test_paths_are_left_alone(tmp_path):
    assert local_path("pretrained/R-50.pyth", tmp_path) == Path("pretrained/R-50.pyth")
    assert local_path(tmp_path / "x.pyth", tmp_path / "cache") == tmp_path / "x.pyth"
    assert names(tmp_path) == []


def test_cached_names_are_safe_and_do_not_collide(tmp_path):
    urls = [
        "http://h/one/a.pyth",
        "http://h/two/a.pyth",
        "https://h/one/a.pyth",
        "http://h:81/one/a.pyth",
        "http://g/one/a.pyth",
        "http://h/one/a.pyth?v=1",
        "http://h/one/a.pyth?v=2",
    ]
    paths = [cache_path(url, tmp_path) for url in urls]
    assert len(set(paths)) == len(urls)
    assert {path.name for path in paths} == {"a.pyth"}
    for url in ["http://h/..%2f..%2fetc%2fpasswd", "http://h/a%00b", "http://h/ä b.pyth", f"http://h/{'x' * 400}.pyth"]:
        path = cache_path(url, tmp_path)
        assert path.resolve().is_relative_to(tmp_path)
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,150}", path.name)
    assert cache_path(f"http://h/{'x' * 400}.pyth", tmp_path).suffix == ".pyth"


def test_blanks_and_letters_beyond_ascii_in_the_address(file_server, tmp_path):
    file_server.files["/gr%C3%BC%C3%9Fe%20a.pyth"] = content(1)
    assert fetch(f"{file_server.url}/grüße a.pyth", tmp_path).read_bytes() == content(1)
    assert fetch(f"{file_server.url}/gr%C3%BC%C3%9Fe%20a.pyth", tmp_path).read_bytes() == content(1)


def test_the_home_sign_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path("http://h/a.pyth", "~/cache").is_relative_to(tmp_path / "cache")


def script(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/download.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def test_processes_that_want_the_same_file_download_it_once(file_server, tmp_path):
    file_server.files["/a.pyth"] = content(1)
    file_server.pause = 0.1
    target = tmp_path / "a.pyth"
    processes = [script(f"{file_server.url}/a.pyth", str(target)) for _ in range(4)]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert target.read_bytes() == content(1)
    assert len(file_server.asked) == 1
    assert names(tmp_path) == ["a.pyth"]


def test_a_killed_process_is_continued_by_the_next(file_server, tmp_path):
    file_server.files["/a.pyth"] = content(1, 4 << 20)
    file_server.pause = 0.02
    target, part = tmp_path / "a.pyth", tmp_path / "a.pyth.part"
    process = script(f"{file_server.url}/a.pyth", str(target))
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 0):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not target.exists()
    file_server.pause = 0.0
    process = script(f"{file_server.url}/a.pyth", str(target))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert target.read_bytes() == content(1, 4 << 20)
    assert int(file_server.asked[-1][1].removeprefix("bytes=").removesuffix("-")) > 0


def test_the_command_reports_a_failure_in_one_line(file_server, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([f"{file_server.url}/none.pyth", str(tmp_path / "none.pyth")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {file_server.url}/none.pyth: the server answers 404 Not Found\n"


def test_a_file_without_a_known_checksum_is_told_of(file_server, tmp_path, capsys):
    file_server.files["/a.pyth"] = content(1)
    download(f"{file_server.url}/a.pyth", tmp_path / "a.pyth")
    assert f"note: {tmp_path / 'a.pyth'}: no checksum is known for it" in capsys.readouterr().err
    download(f"{file_server.url}/a.pyth", tmp_path / "b.pyth", sha256=hashlib.sha256(content(1)).hexdigest().upper())
    assert "note" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------- servers that mean harm or fail


@pytest.fixture
def hostile():
    """Start a server that answers every connection by a function of the socket and the path; returns its address."""
    servers = []

    def start(answer) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        servers.append(listening)

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                request = connection.recv(65536).decode()
                answer(connection, request.split()[1])

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}/a.pyth"

    yield start
    for listening in servers:
        listening.close()


def repeat(connection: socket.socket, data: bytes, pause: float = 0.0) -> None:
    while True:
        connection.sendall(data)
        time.sleep(pause)


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def whole(*lines: str, **status: str):
    """Answers with these headers, and a body without end."""

    def answer(connection: socket.socket, path: str) -> None:
        connection.sendall(head(*lines, **status))
        repeat(connection, b"x" * 65536)

    return answer


HOSTILE = {
    "header line without end": (lambda c, _: repeat(c, b"x" * 65536), "got more than 65536 bytes"),
    "headers without end": (
        lambda c, _: (c.sendall(b"HTTP/1.1 200 OK\r\n"), repeat(c, b"a: b\r\n" * 999)),
        "100 headers",
    ),
    "100 Continue without end": (lambda c, _: repeat(c, head(status="100 Continue") * 99), "bytes of headers|too slow"),
    "dripping headers": (
        lambda c, _: (c.sendall(b"HTTP/1.1 200 OK\r\na: "), repeat(c, b"x", 0.05)),
        "timed out|too slow",
    ),
    "silence": (lambda c, _: time.sleep(30), "timed out|too slow"),
    "dripping body": (
        lambda c, _: (c.sendall(head("Content-Length: 999")), repeat(c, b"x", 0.05)),
        "timed out|too slow",
    ),
    "dripping chunk size": (
        lambda c, _: (c.sendall(head("Transfer-Encoding: chunked")), repeat(c, b"0", 0.05)),
        "timed out|too slow",
    ),
    "size of thousands of digits": (whole(f"Content-Length: {'9' * 6000}"), "does not tell the size"),
    "size larger than the disk": (whole("Content-Length: 999999999999999999"), "bytes left"),
    "size that is no number": (whole("Content-Length: \u00b2"), "does not tell the size"),
    "no size": (whole(), "does not tell the size"),
    "chunks without end": (
        lambda c, _: (c.sendall(head("Transfer-Encoding: chunked")), repeat(c, b"10000\r\n" + b"x" * 65536 + b"\r\n")),
        "of a size that is not told",
    ),
    "a chunk of no size": (
        lambda c, _: c.sendall(head("Transfer-Encoding: chunked") + b"zz\r\n"),
        "connection ended too early",
    ),
    "a part nobody asked for": (whole("Content-Range: bytes 5-9/10", status="206 Partial"), "answers 206"),
    "no content": (whole(status="204 No Content"), "answers 204"),
    "a redirect to itself": (whole("Location: /a.pyth", status="302 Found"), "answers 302 .*infinite loop"),
    "redirects without end": (
        lambda c, path: c.sendall(head(f"Location: {path}x", "Content-Length: 0", status="302 Found")),
        "answers 302 .*infinite loop",
    ),
    "a redirect to a file": (whole("Location: file:///etc/passwd", status="302 Found"), "answers 302"),
    "a redirect to ftp": (whole("Location: ftp://127.0.0.1/a", status="302 Found"), "from http to ftp: refused"),
    "a malformed redirect": (whole("Location: http://[::1", status="302 Found"), "Invalid IPv6 URL"),
    "no HTTP": (lambda c, _: c.sendall(b"\x16\x03\x01"), "what answers is no web server"),
    "nothing": (lambda c, _: None, "Remote end closed connection"),
    "an end too early": (lambda c, _: c.sendall(head("Content-Length: 9") + b"abc"), "ended after 3 of 9 bytes"),
    "a status with a control sequence": (whole(status="404 \x1b[2J"), "the server answers 404"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_server_ends_in_one_line_in_time_and_in_bounded_memory(hostile, tmp_path, monkeypatch, name):
    monkeypatch.setattr("core.base.download.TIMEOUT", 0.5)
    monkeypatch.setattr("core.base.download.MOST_UNTOLD", 1 << 22)
    answer, words = HOSTILE[name]
    url, begun = hostile(answer), time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DownloadError, match=words) as raised:
        download(url, tmp_path / "a.pyth")
    assert str(raised.value).startswith("http://127.0.0.1:") and "\n" not in str(raised.value)
    assert not (tmp_path / "a.pyth").exists()
    assert time.monotonic() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # KB


def test_a_redirect_from_https_to_http_is_refused_and_others_are_followed(file_server, hostile, tmp_path):
    file_server.files["/b.pyth"] = content(1)
    away = head(f"Location: {file_server.url}/b.pyth", "Content-Length: 0", status="302 Found")
    url = hostile(lambda connection, _: connection.sendall(away))
    download(url, tmp_path / "a.pyth")
    assert (tmp_path / "a.pyth").read_bytes() == content(1)
    request = urllib.request.Request("https://host/a.pyth")
    with pytest.raises(DownloadError, match="from https to http: refused"):
        _Redirects().redirect_request(request, io.BytesIO(), 302, "", {}, f"{file_server.url}/b.pyth")
