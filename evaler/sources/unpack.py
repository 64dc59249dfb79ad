"""Unpack a tar.gz archive of photographs without trusting it: nothing in it decides where a file is written."""

import contextlib
import filecmp
import gzip
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from core.base.errors import UserError
from core.base.progress import bar
from evaler.sources.tar_members import members

EXTENSIONS = (".jpg", ".jpeg", ".png")
MEMBER_BYTES = 2**28  # no photograph has more
TOTAL_BYTES = 2**36  # nor has an archive: those of the distractors hold some 10,000 photographs each
MOST_EXPANSION = 20  # photographs are compressed already; only what is made to waste time expands more
BLOCK = 2**20
STAGING = ".unpacking"
# What tarfile and gzip raise for content that is damaged, or made to look so. `gzip.BadGzipFile` is an OSError.
DAMAGED = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError, OverflowError)


class ArchiveError(UserError):
    """An archive that is damaged or asks for too much; the message is one line."""


class Unpacked(NamedTuple):
    images: int  # that the archive holds of those wanted
    kept: int  # of these, as many were there with the same content
    passed_over: int  # members that are not unpacked, folders aside
    first: str  # of these, with the reason


class Wanted:
    """The images that are wanted, as paths below their folder, and which of them a member of an archive is."""

    def __init__(self, names: list[str]) -> None:
        self._names = frozenset(names)
        self._by_basename: dict[str, str | None] = {}
        for name in names:
            basename = name.rpartition("/")[2]
            self._by_basename[basename] = None if basename in self._by_basename else name

    def find(self, member: str) -> str | None:
        """The name that equals the member's path, else the only one that ends in its last part."""
        path = member.removeprefix("./")
        return path if path in self._names else self._by_basename.get(path.rpartition("/")[2])


def unpack(
    archive: Path, folder: Path, wanted: Wanted, *, member_bytes: int = MEMBER_BYTES, total_bytes: int = TOTAL_BYTES
) -> Unpacked:
    """Write those members of `archive` that are `wanted` below `folder`; all of them, or none if it is damaged.

    A member counts if it is a regular file with an image's extension, at least one byte, and neither an absolute path
    nor `..`; it is written where the list of wanted names puts it. The archive is first unpacked and checked in a
    folder of its own, then every image is moved to its place; one that is there with the same content is left alone.

    Raises `ArchiveError` for an archive that is cut short or damaged, holds a file of more than `member_bytes`, or
    more than `total_bytes` in all; `OSError` naming a path for what cannot be written.
    """
    staging = folder / STAGING  # within the folder, which may be a link to another disk
    if staging.exists():  # of a process that was killed
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        staged, passed_over, first = _stage(archive, staging, wanted, member_bytes, total_bytes)
        kept = _put_in_place(staged, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # must not hide why this ends; the next call removes the rest
    return Unpacked(len(staged), kept, passed_over, first)


# ------------------------------------------------------------------------------------------------------------- reading


def _stage(
    archive: Path, staging: Path, wanted: Wanted, member_bytes: int, total_bytes: int
) -> tuple[dict[str, Path], int, str]:
    """Write the wanted members to numbered files; return {name: file}, how many were passed over, and the first."""
    staged: dict[str, Path] = {}
    passed_over, first = 0, ""
    for member, source in _members(archive, member_bytes, total_bytes):
        if member.isdir():
            continue
        why = _unfit(member)
        name = None if why else wanted.find(member.name)
        if name is None or name in staged:
            why = why or ("is not in the list" if name is None else "comes again")
            passed_over, first = passed_over + 1, first or f"{member.name[:200]!a} {why}"
            continue
        # Without an image's extension: a folder of images may be read while this is under way.
        staged[name] = staging / f"{len(staged):06d}.part"
        source.seek(member.offset_data)
        _write(archive, source, member.size, staged[name])
    return staged, passed_over, first


def _unfit(member: tarfile.TarInfo) -> str | None:
    if not member.isreg() or member.issparse():
        return "is no regular file"
    if member.name.startswith("/"):
        return "is an absolute path"
    if ".." in member.name.split("/"):
        return "leads out of the folder"
    if not member.name.lower().endswith(EXTENSIONS):
        return "is no image by its extension"
    return None if member.size else "is empty"


def _members(archive: Path, member_bytes: int, total_bytes: int) -> Iterator[tuple[tarfile.TarInfo, gzip.GzipFile]]:
    """Each member and the unpacked archive. Ends only after the checksum at the archive's end has been found right."""
    most = min(total_bytes, MOST_EXPANSION * (archive.stat().st_size + BLOCK))
    with (
        open(archive, "rb") as file,
        bar(None, archive.name, unit="B", unit_scale=True, total=archive.stat().st_size, leave=False) as shown,
        _refusing_damage(archive),
        _naming(archive),
        gzip.GzipFile(fileobj=file, mode="rb") as stream,
    ):
        for member, end in members(stream):
            # Before anything behind the header is read: passing over a file unpacks it too.
            if member.size > member_bytes:
                raise ArchiveError(
                    f"{archive}: {member.name[:200]!a} has {member.size} bytes, at most {member_bytes} are allowed"
                )
            if max(end, member.offset_data + member.size) > most:
                raise ArchiveError(f"{archive}: holds more than the {most} bytes that are allowed")
            yield member, stream
            shown.update(file.tell() - shown.n)
        while stream.read(BLOCK):  # to the checksum at the end
            if stream.tell() > most:
                raise ArchiveError(f"{archive}: holds more than the {most} bytes that are allowed")


@contextlib.contextmanager
def _refusing_damage(archive: Path) -> Iterator[None]:
    try:
        yield
    except ArchiveError:
        raise
    except DAMAGED as error:
        raise ArchiveError(_damage(archive, " ".join(str(error).split()) or type(error).__name__)) from error


def _damage(archive: Path, how: str) -> str:
    return f"{archive}: a damaged archive, or one cut short ({how}); delete it and run again to download it anew"


# ------------------------------------------------------------------------------------------------------------- writing


def _write(archive: Path, source: io.BufferedIOBase, size: int, path: Path) -> None:
    """The next `size` bytes of the archive."""
    with _refusing_damage(archive), _naming(path), open(path, "xb") as file:
        while size:
            block = source.read(min(size, BLOCK))
            if not block:
                raise tarfile.ReadError("unexpected end of data")
            file.write(block)
            size -= len(block)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an `OSError` tell the file: that of a write (the disk is full) does not."""
    try:
        yield
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _put_in_place(staged: dict[str, Path], folder: Path) -> int:
    """Move the files to their names, on the disk for good; return how many were there with the same content."""
    new = {name: part for name, part in staged.items() if not _same(part, folder / name)}
    os.sync()  # of everything once: asking file by file takes a hundred times as long
    for name, part in new.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)
    os.sync()  # the names too, before the archive is noted as done and deleted
    return len(staged) - len(new)


def _same(part: Path, path: Path) -> bool:
    return path.is_file() and filecmp.cmp(part, path, shallow=False)
