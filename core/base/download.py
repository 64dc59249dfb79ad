"""Weights given by address: download over http(s), continue what was broken off, keep what is complete.

A server is not trusted: whatever it sends, and however slowly, ends in time, in bounded memory and in one line.
"""

import contextlib
import fcntl
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import socket
import string
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from core.base.arguments import Parser
from core.base.errors import UserError, entry_point
from core.base.files import atomic_write, sha256_file
from core.base.terminal import reason_of

TIMEOUT = 60  # seconds in which a server that sends fewer than SLOWEST bytes counts as lost
SLOWEST = 1 << 16
BLOCK = 1 << 20
MOST_HEADERS = 1 << 20  # bytes before the body
MOST_UNTOLD = 1 << 32  # bytes of a file whose size the server does not tell
MOST_REDIRECTS = 10


class DownloadError(UserError):
    """An address that cannot be used, or a download that failed; the message names the address."""


def local_path(path_or_url: str | os.PathLike, cache_dir: str | os.PathLike, *, sha256: str | None = None) -> Path:
    """The path itself, or the cached download where an http(s) address is given. Raises `DownloadError`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path_or_url)):
        return fetch(str(path_or_url), cache_dir, sha256=sha256)
    return Path(path_or_url)


def fetch(url: str, cache_dir: str | os.PathLike, *, sha256: str | None = None) -> Path:
    """Download `url` into the cache, if it is not there yet, and return the file's path. Raises `DownloadError`."""
    path = cache_path(url, cache_dir)
    download(url, path, sha256=sha256)
    return path


def cache_path(url: str, cache_dir: str | os.PathLike) -> Path:
    """`<cache>/<host>-<hash of the address>/<file name>`: readable, and different for different addresses."""
    parts = _split(url)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", urllib.parse.unquote(parts.path).rpartition("/")[2])[-150:]
    if not name.strip("._"):
        raise DownloadError(f"{url}: the address ends in no file name")
    host = re.sub(r"[^A-Za-z0-9.-]", "_", parts.hostname or "")[:100]
    folder = f"{host}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    return Path(cache_dir).expanduser() / folder / name


def download(url: str, path: str | os.PathLike, *, sha256: str | None = None) -> None:
    """Download `url` to `path`. A complete `path` is kept; what an earlier try left in `<path>.part` is continued.

    Several processes may ask for the same file at once: one downloads, the others wait for it. The size is held
    against what the server announces and, when `sha256` is given, the content against that; that no checksum is known
    is told on stderr.
    Raises `DownloadError` in one line that names the address.
    """
    path, sha256 = Path(path), sha256 and sha256.lower()
    _split(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not path.exists():
            with _exclusive(path) as part:
                if part is not None and not path.exists():
                    _complete(url, part, path, sha256)
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of urllib, for a malformed redirect
        raise DownloadError(f"{url}: {_one_line(error)}") from error
    if sha256 is not None and sha256_file(path) != sha256:
        raise DownloadError(f"{url}: {path} has another sha256 than {sha256}; delete it to download it again")


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:  # urllib's own, for a malformed host or port
        raise DownloadError(f"{url}: {error}") from error
    if not usable:
        raise DownloadError(f"{url}: only http:// and https:// addresses can be downloaded")
    return parts


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _memo(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.json")


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[BinaryIO | None]:
    """Open and lock the partial file of `path`. None: another process finished it while this one waited."""
    part = _part(path)
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(part))
        except FileNotFoundError:
            same = False
        try:
            yield file if same else None
        finally:
            if same and os.fstat(file.fileno()).st_size == 0:  # nothing to go on from
                part.unlink(missing_ok=True)
                _memo(path).unlink(missing_ok=True)


class _Origin(NamedTuple):
    """What a partial file is a part of: kept beside it, so that two versions of a file are never mixed."""

    validator: str | None  # ETag or Last-Modified, whatever If-Range may carry
    size: int | None  # bytes of the complete file


def _complete(url: str, part: BinaryIO, path: Path, sha256: str | None) -> None:
    """Bring the locked partial file to its end and give it its name."""
    have = os.fstat(part.fileno()).st_size
    origin = _read_memo(_memo(path)) if have else None
    if origin is None:
        have = 0
    if origin is None or have != origin.size:
        response, have = _request(url, have, origin)
        with response:
            part.truncate(have)
            origin = _origin(response)
            _check_size(url, path, origin, have, known=sha256 is not None or response.chunked)
            with atomic_write(_memo(path)) as file:
                file.write(json.dumps(origin._asdict()).encode())
            _copy(url, response, part, have, origin.size, path.name)
    part.flush()
    os.fsync(part.fileno())
    have = os.fstat(part.fileno()).st_size
    if origin.size is not None and have != origin.size:
        raise DownloadError(f"{url}: the connection ended after {have} of {origin.size} bytes; run again to go on")
    if sha256 is not None and (digest := sha256_file(_part(path))) != sha256:
        part.truncate(0)
        raise DownloadError(f"{url}: the sha256 is {digest}, not {sha256}; nothing is kept")
    os.replace(_part(path), path)
    _memo(path).unlink(missing_ok=True)
    if sha256 is None:
        print(f"note: {path}: no checksum is known for it, only its size was checked", file=sys.stderr)


def _check_size(url: str, path: Path, origin: _Origin, have: int, *, known: bool) -> None:
    """`known`: the end can be told without the size."""
    if origin.size is None:
        if not known:
            raise DownloadError(f"{url}: the server does not tell the size, so the file could not be checked")
        return
    free = shutil.disk_usage(path.parent).free
    if origin.size - have > free:
        raise DownloadError(f"{url}: it has {origin.size:,} bytes, and {path.parent} has {free:,} bytes left")


def _read_memo(memo: Path) -> _Origin | None:
    """None where there is nothing that tells one version of the file from another: equal sizes do not."""
    try:
        origin = _Origin(**json.loads(memo.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    if not origin.validator or not isinstance(origin.validator, str):
        return None  # an empty `ETag:` tells no versions apart
    return origin if origin.size is None or type(origin.size) is int else None


def _request(url: str, have: int, origin: _Origin | None) -> tuple[http.client.HTTPResponse, int]:
    """Ask for the bytes from `have` on; return the answer and the position at which its body starts."""
    # Blanks and non-ASCII letters are escaped; what is escaped already stays.
    request = urllib.request.Request(urllib.parse.quote(url, safe=string.punctuation))
    if origin is not None:
        assert origin.validator is not None  # `_read_memo` gives no other
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", origin.validator)
    try:
        response = _opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not (have and error.code == 416):  # the range does not exist: the file has become shorter
            raise
        error.close()
        return _request(url, 0, None)
    if response.status == 200:
        return response, 0  # where a range was asked for: the server does not continue, or the file has changed
    continues = response.status == 206 and _range(response)[0] == have
    if origin is not None and continues and _continues(origin, _origin(response)):
        return response, have
    response.close()
    if not have:
        raise DownloadError(f"{url}: the server answers {response.status}, which is not the file")
    return _request(url, 0, None)


def _continues(old: _Origin, new: _Origin) -> bool:
    return old.size in (None, new.size) and old.validator == new.validator


def _range(response: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """First byte and complete size, by Content-Range."""
    match = re.match(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})$", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else (None, None)


def _origin(response: http.client.HTTPResponse) -> _Origin:
    validator = response.headers.get("ETag")
    if validator is None or validator.startswith("W/"):  # a weak ETag does not promise equal bytes
        validator = response.headers.get("Last-Modified")
    if response.status == 206:
        return _Origin(validator, _range(response)[1])
    length = response.headers.get("Content-Length", "")
    return _Origin(validator, int(length) if re.fullmatch("[0-9]{1,18}", length) else None)


def _copy(
    url: str, response: http.client.HTTPResponse, part: BinaryIO, start: int, size: int | None, name: str
) -> None:
    with tqdm(desc=name, initial=start, total=size, unit="B", unit_scale=True, unit_divisor=1024) as progress:
        while block := response.read1(BLOCK):
            part.write(block)
            progress.update(len(block))
            if size is None and progress.n > MOST_UNTOLD:
                part.truncate(0)
                raise DownloadError(f"{url}: of a size that is not told, and more than {MOST_UNTOLD:,} bytes")


# -------------------------------------------------------------------------------------- connections that end in time


class _Paced(io.RawIOBase):
    """What a server sends. Raises `TimeoutError` where it is too slow, whether it is silent or drips.

    The timeout of a socket begins anew with every byte.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._raw = connection, connection.makefile("rb", buffering=0)
        self._deadline, self._got = time.monotonic() + TIMEOUT, 0
        self.left: int | None = MOST_HEADERS  # bytes until the body begins

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wait = self._deadline - time.monotonic()
        if wait <= 0:
            raise TimeoutError(f"the server is too slow, fewer than {SLOWEST} bytes in {TIMEOUT} seconds")
        self._socket.settimeout(wait)
        got = self._raw.readinto(buffer)
        assert got is not None, "the socket waits for bytes"
        self._got += got
        if self.left is not None:
            self.left -= got
            if self.left < 0:
                raise http.client.HTTPException(f"more than {MOST_HEADERS} bytes of headers")
        elif self._got >= SLOWEST:
            self._deadline, self._got = time.monotonic() + TIMEOUT, 0
        return got

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, connection: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(connection, *args, **kwargs)
        self.fp.close()
        self._paced = _Paced(connection)
        self.fp = io.BufferedReader(self._paced)

    def begin(self) -> None:
        super().begin()
        self._paced.left = None


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http(s) only, and never from https to http, where anybody on the way could change the file."""

    max_redirections = MOST_REDIRECTS

    def redirect_request(self, request, response, code, message, headers, url):
        response.close()  # urllib would read its body into memory, whatever its size
        before, after = (urllib.parse.urlsplit(address).scheme for address in (request.full_url, url))
        if after not in ("http", "https") or (before, after) == ("https", "http"):
            raise DownloadError(f"{request.full_url}: the server sends on to {url}, from {before} to {after}: refused")
        return super().redirect_request(request, response, code, message, headers, url)


def _opener() -> urllib.request.OpenerDirector:
    """As `urllib.request.urlopen`, proxies of the environment included; but neither ftp nor files."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Handler(),
        _SecureHandler(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _one_line(error: BaseException | str) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return "the server answers " + " ".join(f"{error.code} {error.reason}".split())[:300]
    if isinstance(error, urllib.error.URLError):
        error = error.reason
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return "what answers is no web server"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended too early; run again to go on"
    if isinstance(error, TimeoutError):
        return f"{error}; run again to go on"
    return reason_of(error)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Download one file over http(s); run again to go on after a break.")
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--sha256", help="refuse a file with another checksum")
    args = parser.parse_args(argv)
    if args.file.exists():
        print(f"{args.file} is there already")
    download(args.url, args.file, sha256=args.sha256)
