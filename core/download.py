"""Weights given by address: download over http(s), continue what was broken off, keep what is complete."""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import string
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from core.arguments import Parser
from core.environment import atomic_write, entry_point, sha256_file

TIMEOUT = 60  # seconds without a byte after which a server counts as lost
BLOCK = 1 << 20


class DownloadError(ValueError):
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
    against what the server announces and, when `sha256` is given, the content against that.
    Raises `DownloadError` in one line that names the address.
    """
    path = Path(path)
    _split(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not path.exists():
            with _exclusive(path) as part:
                if part is not None and not path.exists():
                    _complete(url, part, path, sha256)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
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
            if origin.size is None and sha256 is None and not response.chunked:
                raise DownloadError(f"{url}: the server does not tell the size, so the file could not be checked")
            with atomic_write(_memo(path)) as file:
                file.write(json.dumps(origin._asdict()).encode())
            _copy(response, part, have, origin.size, path.name)
    part.flush()
    os.fsync(part.fileno())
    have = os.fstat(part.fileno()).st_size
    if origin.size is not None and have != origin.size:
        raise DownloadError(f"{url}: the connection ended after {have} of {origin.size} bytes; run again to go on")
    if sha256 is not None and (found := sha256_file(_part(path))) != sha256:
        part.truncate(0)
        raise DownloadError(f"{url}: the sha256 is {found}, not {sha256}; nothing is kept")
    os.replace(_part(path), path)
    _memo(path).unlink(missing_ok=True)


def _read_memo(memo: Path) -> _Origin | None:
    """None where there is nothing that a later answer of the server could be held against."""
    try:
        origin = _Origin(**json.loads(memo.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return origin if any(origin) else None


def _request(url: str, have: int, origin: _Origin | None) -> tuple[http.client.HTTPResponse, int]:
    """Ask for the bytes from `have` on; return the answer and the position at which its body starts."""
    # Blanks and non-ASCII letters are escaped; what is escaped already stays.
    request = urllib.request.Request(urllib.parse.quote(url, safe=string.punctuation))
    if have:
        request.add_header("Range", f"bytes={have}-")
        if origin.validator is not None:
            request.add_header("If-Range", origin.validator)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not (have and error.code == 416):  # the range does not exist: the file has become shorter
            raise
        error.close()
        return _request(url, 0, None)
    if not have or response.status != 206:
        return response, 0  # 200: the server does not continue, or the file has changed
    if _range(response)[0] == have and _continues(origin, _origin(response)):
        return response, have
    response.close()
    return _request(url, 0, None)


def _continues(old: _Origin, new: _Origin) -> bool:
    return old.size in (None, new.size) and (None in (old.validator, new.validator) or old.validator == new.validator)


def _range(response: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """First byte and complete size, by Content-Range."""
    match = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else (None, None)


def _origin(response: http.client.HTTPResponse) -> _Origin:
    validator = response.headers.get("ETag")
    if validator is None or validator.startswith("W/"):  # a weak ETag does not promise equal bytes
        validator = response.headers.get("Last-Modified")
    if response.status == 206:
        return _Origin(validator, _range(response)[1])
    length = response.headers.get("Content-Length", "")
    return _Origin(validator, int(length) if length.isdigit() else None)


def _copy(response: http.client.HTTPResponse, part: BinaryIO, start: int, size: int | None, name: str) -> None:
    with tqdm(desc=name, initial=start, total=size, unit="B", unit_scale=True, unit_divisor=1024) as progress:
        while block := response.read(BLOCK):
            part.write(block)
            progress.update(len(block))


def _one_line(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        error = error.reason
    return " ".join(str(error).split()) or type(error).__name__


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
