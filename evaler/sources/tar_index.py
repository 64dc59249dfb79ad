"""Which images lie where in tar archives, found out once and kept.

Reading the headers of a million members takes about a minute, so the index can be kept in a file: one line with the
sha256 of the rest, one line of JSON, offsets and sizes as int64, and the names. Plain data, nothing is executed.
"""

import hashlib
import io
import json
import os
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from core.base.files import atomic_write
from core.base.progress import bar
from core.processes.distributed import is_main
from datasets.images.decode import ImageError
from datasets.images.files import EXTENSIONS, is_hidden
from evaler.sources.image_names import checked_name, first_double
from evaler.sources.tar_members import members

VERSION = 3
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")  # gzip, bzip2, xz, zstd, zip


@dataclass(frozen=True)
class Archive:
    """An archive as it was when it was indexed, and what was found in it."""

    path: str  # absolute
    size: int
    mtime_ns: int
    ctime_ns: int
    images: int = 0
    links: int = 0  # members with an image's extension that are links: their bytes lie elsewhere
    others: int = 0
    hidden: int = 0
    first_hidden: str = ""


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Images in the order of the archives and of their members. offsets, sizes: int64 [N], bytes in the archive."""

    archives: list[Archive]
    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray


def tar_index(paths: Sequence[str | os.PathLike], cache: Path | None = None) -> TarIndex:
    """Index archives, or take the index that is in `cache` if path, size and times of change of each are as they were.

    A name is a member's path without a leading `./`. Regular members with an image's extension (`EXTENSIONS`) count,
    but for hidden ones.
    Raises `ImageError` for an archive that is missing, compressed, truncated or damaged, or holds a sparse image, and
    for a name that comes twice or cannot be written down.
    """
    archives = [_archive(os.path.abspath(path)) for path in paths]
    index = _load(cache, archives) if cache is not None else None
    if index is None:
        index = _build(archives)
        if cache is not None:
            _save(cache, index)
    return index


def _archive(path: str) -> Archive:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
    return Archive(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


# ------------------------------------------------------------------------------------------------------------- reading


def _build(archives: list[Archive]) -> TarIndex:
    names: list[str] = []
    archives_read, offsets, sizes = [], array("q"), array("q")
    total = sum(archive.size for archive in archives)
    with bar(
        None, "indexing", unit="B", unit_scale=True, total=total, delay=2, leave=False, disable=not is_main()
    ) as shown:
        for archive in archives:
            archives_read.append(_read(archive, names, offsets, sizes, shown.update))
    double = first_double(names)
    if double is not None:
        ends = np.cumsum([archive.images for archive in archives_read])
        one, two = (archives_read[int(np.searchsorted(ends, row, side="right"))].path for row in double)
        raise ImageError(f"{two}: {names[double[1]]} is in {'it twice' if one == two else f'{one} too'}")
    return TarIndex(archives_read, names, np.array(offsets), np.array(sizes))


def _read(archive: Archive, names: list[str], offsets: array, sizes: array, advance: Callable) -> Archive:
    """Add the images of an archive; return it with their number."""
    path, before = archive.path, len(names)
    links = others = hidden = position = 0
    first_hidden = ""
    try:
        with open(path, "rb") as file:
            for member, end in _members(path, file):
                if is_hidden(member.name):
                    hidden, first_hidden = hidden + 1, first_hidden or member.name[:200]
                elif member.isdir() or not member.name.lower().endswith(EXTENSIONS):
                    others += not member.isdir()
                elif not member.isreg():
                    links += 1
                elif member.issparse():
                    raise ImageError(f"{path}: {member.name[:200]!a} is stored as a sparse file; pack without --sparse")
                elif member.offset_data + member.size > archive.size:
                    raise _damaged(path, f"{member.name[:200]!a} has {member.size} bytes")
                else:
                    names.append(_member_name(path, member))
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                advance(end - position)
                position = end
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
    if _archive(path) != archive:
        raise ImageError(f"{path}: has changed while it was read; wait until it is complete")
    images = len(names) - before
    return replace(archive, images=images, links=links, others=others, hidden=hidden, first_hidden=first_hidden)


def _members(path: str, file: io.BufferedIOBase) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member, and where it ends."""
    if file.read(8).startswith(_PACKED):
        raise ImageError(f"{path}: compressed, its members cannot be read at random; unpack it to a plain .tar")
    file.seek(0)
    end = 0
    try:
        for member, end in members(file):
            yield member, end
    except tarfile.TarError as error:
        raise _damaged(path, str(error)) from error
    _check_end(path, file, end)


def _check_end(path: str, file: io.BufferedIOBase, position: int) -> None:
    """The end is zeros, a block of 512 at least, and nothing else."""
    file.seek(position)
    if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise _damaged(path, "it has no end mark")
    while rest := file.read(2**20):
        if rest.count(0) < len(rest):
            raise ImageError(f"{path}: goes on behind its end mark; name archives one by one instead of joining them")


def _damaged(path: str, how: str) -> ImageError:
    return ImageError(f"{path}: a truncated or damaged archive ({how}); get it again")


def _member_name(path: str, member: tarfile.TarInfo) -> str:
    try:
        return checked_name(member.name)
    except ValueError as error:
        raise ImageError(f"{path}: {member.name[:200]!a} {error}") from None


# ------------------------------------------------------------------------------------------------------------- keeping


def _save(cache: Path, index: TarIndex) -> None:
    header = {"version": VERSION, "archives": [asdict(archive) for archive in index.archives]}
    parts = (
        json.dumps(header).encode() + b"\n",
        index.offsets.astype("<i8").tobytes(),
        index.sizes.astype("<i8").tobytes(),
        "\n".join(index.names).encode(),
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    with atomic_write(cache) as file:
        file.write(digest.hexdigest().encode() + b"\n")
        file.writelines(parts)


def _load(cache: Path, archives: list[Archive]) -> TarIndex | None:
    """None if there is no index, a damaged one, or one of other archives: it is made again."""
    try:
        content = cache.read_bytes()
    except OSError:  # mostly: there is none
        return None
    digest, _, body = content.partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode():
        return None
    header, _, body = body.partition(b"\n")  # from here on the content is what _save wrote
    header = json.loads(header)
    if header["version"] != VERSION:
        return None
    archives_known = [Archive(**fields) for fields in header["archives"]]
    if [Archive(old.path, old.size, old.mtime_ns, old.ctime_ns) for old in archives_known] != archives:
        return None
    count = sum(archive.images for archive in archives_known)
    offsets, sizes = np.frombuffer(body, "<i8", 2 * count).reshape(2, count).astype(np.int64)
    names = body[16 * count :].decode().split("\n") if count else []
    return TarIndex(archives_known, names, offsets, sizes)
