"""What list files are made from: the CSVs of Google Landmarks v2, a CSV of paths and labels, a folder per class."""

import array
import contextlib
import csv
import os
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from datasets.errors import DataError
from datasets.images.files import EXTENSIONS, is_hidden

IMAGE_ID = re.compile(r"[0-9a-f]{16}")
LANDMARK_ID = re.compile(r"[0-9]{1,15}")  # 16 digits would be an image's id
WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")
NO_TEXT = re.compile("[\\0\\ud800-\\udfff]")  # surrogates stand for bytes that are not UTF-8
FORMS = "landmark_id,images (train_clean.csv), id,url,landmark_id (train.csv) or path,label"


class SourceError(DataError):
    """A source that list files cannot be made from; the message is one line: file, line number, mend."""


@dataclass
class Listing:
    """N images and their classes, by path: the same for the same content, whatever order it was found in."""

    source: str  # the CSV or the folder, for messages
    paths: list[str]  # N, below the image root, each once, ascending
    classes: np.ndarray  # int64 [N], indices of `class_names`
    class_names: list[str]  # ascending: by value if all are whole numbers, else by code point
    lines: np.ndarray | None  # int64 [N], lines of the CSV; None for a tree
    is_gldv2: bool  # paths come from image ids, class names are landmark ids

    def where(self, index: int) -> str:
        return self.source if self.lines is None else f"{self.source}, line {self.lines[index]}"

    def keep(self, mask: np.ndarray) -> "Listing":
        """The images where `mask` (bool [N]) is set, and the classes that have one of them, numbered anew."""
        kept, classes = np.unique(self.classes[mask], return_inverse=True)
        return Listing(
            self.source,
            [self.paths[i] for i in np.flatnonzero(mask).tolist()],
            classes.astype(np.int64),
            [self.class_names[k] for k in kept],
            None if self.lines is None else self.lines[mask],
            self.is_gldv2,
        )


def gldv2_path(image_id: str) -> str:
    return f"{image_id[0]}/{image_id[1]}/{image_id[2]}/{image_id}.jpg"


def read_csv(file: str | os.PathLike) -> Listing:
    """Read a table whose header tells its form; column order, more columns, a byte order mark and CRLF do not matter.

    Raises SourceError for a table that is missing or of another form, for a bad field and for an image listed twice.
    """
    paths: list[str] = []
    labels: list[str] = []
    lines = array.array("q")
    with contextlib.closing(csv_rows(file)) as rows:
        _, header = next(rows, (1, []))
        header = [name.strip() for name in header]
        read_row, columns = _form(file, header)
        for line, row in rows:
            if len(row) != len(header):
                raise SourceError(f"{file}, line {line}: {len(row)} fields, but the header has {len(header)}")
            try:
                values, label = read_row(*(row[column] for column in columns))
            except SourceError as error:
                raise SourceError(f"{file}, line {line}: {error}") from None
            paths += values
            labels += [label] * len(values)
            lines.extend([line] * len(values))
    return _listing(str(file), paths, labels, np.array(lines, np.int64), is_gldv2=read_row is not _own_row)


def csv_rows(file: str | os.PathLike) -> Generator[tuple[int, list[str]], None, None]:
    """Every row that is not blank, with the number of its first line."""
    limit = csv.field_size_limit(1 << 30)  # the usual 128 KiB are 7,710 images of one landmark
    try:
        # A byte that is not UTF-8 shows up in its field, whose check names the line; elsewhere it does no harm.
        with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
            reader = csv.reader(text, strict=True)
            start = 1
            for row in reader:
                if row:
                    yield start, row
                start = reader.line_num + 1
    except FileNotFoundError:
        raise SourceError(f"{file}: no such table") from None
    except OSError as error:
        raise SourceError(f"{file}: the table cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise SourceError(f"{file}, line {start}: not a CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _form(file: str | os.PathLike, header: list[str]) -> tuple[Callable[..., tuple[list[str], str]], list[int]]:
    """The function that reads one row, and the columns that it takes."""
    known = {
        ("images", "landmark_id"): _clean_row,
        ("id", "landmark_id"): _train_row,
        ("path", "label"): _own_row,
    }
    fitting = [(names, function) for names, function in known.items() if set(names) <= set(header)]
    if len(fitting) != 1 or any(header.count(name) > 1 for name in fitting[0][0]):
        columns = ",".join(header)[:100].encode("ascii", "backslashreplace").decode()
        raise SourceError(f"{file}, line 1: the columns are {columns!r}; expected {FORMS}")
    names, function = fitting[0]
    return function, [header.index(name) for name in names]


def _clean_row(images: str, landmark: str) -> tuple[list[str], str]:
    ids = images.split()
    if not ids:
        raise SourceError(f"landmark {landmark} has no images")
    return [_path_of(image) for image in ids], landmark_name(landmark)


def _train_row(image: str, landmark: str) -> tuple[list[str], str]:
    return [_path_of(image)], landmark_name(landmark)


def _path_of(image: str) -> str:
    if not IMAGE_ID.fullmatch(image):
        raise SourceError(f"{image[:100]!a} is not an image id; expected 16 of the characters 0-9a-f")
    return gldv2_path(image)


def landmark_name(text: str) -> str:
    """`007` -> `7`. Raises SourceError for what is no landmark's id."""
    if not LANDMARK_ID.fullmatch(text):
        raise SourceError(f"{text[:100]!a} is not a landmark id; expected a whole number")
    return str(int(text))


def _own_row(path: str, label: str) -> tuple[list[str], str]:
    label = label.strip()
    for name, value in (("path", path), ("label", label)):
        if not value:
            raise SourceError(f"the {name} is empty")
        if NO_TEXT.search(value):
            raise SourceError(f"the {name} {value[:200]!a} is not UTF-8 text")
    return [os.path.normpath(path)], label  # so that a/b.jpg and a//b.jpg are known as one image


def read_tree(root: str | os.PathLike) -> tuple[Listing, list[str], list[str]]:
    """The images below `root`, each of the class that its folder's path below `root` names; other files; hidden ones.

    Links to folders are followed, hidden folders are not entered. Raises SourceError for an image outside any folder, a
    folder that is reached twice, and a name that is not UTF-8.
    """
    root = os.path.abspath(root)
    paths, labels, others, hidden = [], [], [], []
    seen: dict[str, str] = {}
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(folder)
        if real in seen:
            raise SourceError(f"{folder}: the same folder as {seen[real]}; its images would be listed twice")
        seen[real] = folder
        label = Path(os.path.relpath(folder, root)).as_posix()
        inside = "" if label == "." else f"{label}/"
        hidden += [inside + name for name in (*folders, *files) if is_hidden(name)]
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in files:
            path = inside + name
            if is_hidden(name):
                continue
            if not name.lower().endswith(EXTENSIONS):
                others.append(path)
                continue
            if NO_TEXT.search(path):
                raise SourceError(f"{root}: the name {path!a} is not UTF-8 text; rename it")
            if label == ".":
                raise SourceError(f"{root}/{path}: an image in no class folder; move it into one")
            paths.append(path)
            labels.append(label)
    if not paths:
        raise SourceError(f"{root}: no images below this folder; expected <class>/<name>{' or '.join(EXTENSIONS)}")
    return _listing(root, paths, labels, None, is_gldv2=False), sorted(others), sorted(hidden)


def _refuse_folder(error: OSError) -> None:
    raise SourceError(f"{error.filename}: the folder cannot be listed ({error.strerror})") from error


def _listing(source: str, paths: list[str], labels: list[str], lines: np.ndarray | None, *, is_gldv2: bool) -> Listing:
    if not paths:
        raise SourceError(f"{source}: no images in it")
    names = set(labels)
    numbers = all(map(WHOLE_NUMBER.fullmatch, names))
    class_names = sorted(names, key=(lambda name: (int(name), name)) if numbers else None)
    number = {name: k for k, name in enumerate(class_names)}
    order = sorted(range(len(paths)), key=paths.__getitem__)
    classes = np.fromiter(map(number.__getitem__, labels), np.int64, len(labels))[order]
    lines = None if lines is None else lines[order]
    listing = Listing(source, [paths[i] for i in order], classes, class_names, lines, is_gldv2)
    _refuse_twins(listing)
    return listing


def _refuse_twins(listing: Listing) -> None:
    """One image in training and validation, or in two classes, spoils both."""
    paths, lines = listing.paths, listing.lines
    twins = [i for i, (before, path) in enumerate(pairwise(paths), start=1) if path == before]
    if twins:
        assert lines is not None, "no folder holds two files of one name"
        first, second = sorted((twins[0] - 1, twins[0]), key=lines.__getitem__)
        classes = [listing.class_names[listing.classes[i]] for i in (first, second)]
        both = f"for {classes[0]!r} and {classes[1]!r}" if classes[0] != classes[1] else f"twice for {classes[0]!r}"
        raise SourceError(
            f"{listing.where(second)}: {paths[first]} is listed {both}, first in line {lines[first]} "
            f"({len(twins)} images in all); remove one"
        )
