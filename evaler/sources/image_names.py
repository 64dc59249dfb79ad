"""Names of images: those in a folder, those of a list file, and what a name must not be.

A name is a path relative to a folder, with `/` between its parts. It is the key of the image in all that is written.
"""

import itertools
import os
import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path

from core.base.errors import UserError
from core.base.progress import bar
from core.processes.distributed import is_main
from datasets.images.decode import ImageError
from datasets.images.files import EXTENSIONS, is_hidden

ARCHIVES = (".tar",)
# Inside a compressed archive nothing can be reached without unpacking all that lies before it.
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".zip", ".7z")
_UNWRITABLE = re.compile(r"[\0\t\n\r\ud800-\udfff]")  # each name becomes a field of a table in UTF-8
_BOM = b"\xef\xbb\xbf"
_HEAD = 2**16  # bytes that tell a text from another file


def checked_name(name: str) -> str:
    """`name` without `./` and doubled slashes. Raises `UserError` saying what it is: a phrase, without the name."""
    if _UNWRITABLE.search(name):
        raise UserError("holds a tab, a line break or no UTF-8, rename that file")
    if name.startswith("/"):
        raise UserError("is an absolute path, a relative one is wanted")
    if ".." in name and ".." in name.split("/"):
        raise UserError("leads out of its folder by `..`")
    return posixpath.normpath(name) if "./" in name or "//" in name else name


@dataclass
class Found:
    """What lies in a folder and below: names relative to it, sorted as strings."""

    images: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    others: int = 0
    hidden: list[str] = field(default_factory=list)  # hidden folders are not entered
    circles: list[str] = field(default_factory=list)  # links that lead to a folder they lie in


def search(folder: Path) -> Found:
    """Everything below `folder` that is not hidden, told apart by extension.

    Links to folders are followed, except where one leads back to a folder that it lies in. Whatever is no folder and
    has an image's extension counts as an image, a link that leads nowhere too: it is missing, not absent by intention.
    Raises `ImageError` for a folder that cannot be read and for a name that cannot be written down.
    """
    result = Found()
    waiting: list[tuple[str, frozenset]] = [("", frozenset())]
    with bar(None, "listing", unit="file", delay=2, leave=False, disable=not is_main()) as shown:
        while waiting:
            inner, above = waiting.pop()
            try:
                with os.scandir(folder / inner) as entries:
                    identity = _identity(os.stat(folder / inner))
                    if identity in above:
                        result.circles.append(inner)
                        continue
                    for entry in entries:
                        name = f"{inner}/{entry.name}" if inner else entry.name
                        if is_hidden(entry.name):
                            result.hidden.append(name)
                        elif entry.is_dir():
                            waiting.append((name, above | {identity}))
                        else:
                            _sort_in(result, name)
                            shown.update()
            except OSError as error:
                raise ImageError(f"INFER.IMAGES {error.filename}: cannot be read ({error.strerror})") from error
    for names in (result.images, result.archives, result.compressed, result.hidden, result.circles):
        names.sort()
    for name in itertools.chain(result.images, result.archives):
        try:
            checked_name(name)
        except ValueError as error:
            raise ImageError(f"INFER.IMAGES {folder}: {name!a} {error}") from None
    return result


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _sort_in(result: Found, name: str) -> None:
    lower = name.lower()
    if lower.endswith(EXTENSIONS):
        result.images.append(name)
    elif lower.endswith(ARCHIVES):
        result.archives.append(name)
    else:
        result.others += 1
        if lower.endswith(COMPRESSED):
            result.compressed.append(name)


def read_list(path: Path, *, key: str) -> list[str]:
    """The names in a list file: a relative path a line, in UTF-8, with or without a byte order mark, LF or CR LF.

    Empty lines at the end do not count. Raises `ImageError` naming the line: for an empty one before the end, an
    absolute path, a `..`, what cannot be written down, a name that comes twice. `key` is what the user set.
    """
    names, empty = [], 0
    with open(path, "rb") as file:
        if b"\0" in file.read(_HEAD):
            raise ImageError(f"{key} {path}: not a text file in UTF-8; a list has one relative path a line")
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            name = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")
            if not name:
                empty = empty or number
                continue
            if empty:
                raise ImageError(f"{key} {path}, line {empty}: empty, with names behind it; remove it")
            try:
                names.append(checked_name(name))
            except ValueError as error:
                raise ImageError(f"{key} {path}, line {number}: {name[:200]!a} {error}") from None
    if not names:
        raise ImageError(f"{key} {path}: an empty list")
    double = first_double(names)
    if double is not None:
        first, second = double
        raise ImageError(f"{key} {path}: {names[first]} stands in line {first + 1} and again in line {second + 1}")
    return names


def first_double(names: list[str]) -> tuple[int, int] | None:
    """The indices of the first name that comes again and of where it does; None if all differ."""
    if len(set(names)) == len(names):
        return None
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if seen.setdefault(name, index) != index:
            return seen[name], index
    raise AssertionError("a double is among them")
