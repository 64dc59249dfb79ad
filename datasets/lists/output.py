"""List files as `datasets.landmark.read_list` reads them: all written, or none, and nothing replaced unasked."""

import contextlib
import csv
import io
import os
import re
import tempfile
from pathlib import Path

import numpy as np

from datasets.lists.sources import Listing, SourceError

TRAIN, VAL, UNSEEN = "train_list.txt", "val_list.txt", "unseen_list.txt"
LABELS, MISSING = "labels.csv", "missing.txt"
# What a line `path label` cannot hold: its ends are stripped, and the label is what follows the last white space.
UNFIT = re.compile(r"[\n\0\ud800-\udfff]|\A[\s\ufeff]|\s\Z")


def path_prefix(images: str | os.PathLike, out: str | os.PathLike) -> str:
    """What stands before an image's path below `images` in a list: relative where `images` lies in `out`."""
    for name in (os.path.abspath, os.path.realpath):
        root, folder = Path(name(images)), Path(name(out))
        if root.is_relative_to(folder):
            relative = root.relative_to(folder).as_posix()
            return "" if relative == "." else f"{relative}/"
    return f"{Path(os.path.abspath(images)).as_posix().rstrip('/')}/"


def list_files(listing: Listing, validation: np.ndarray, unseen: np.ndarray, *, prefix: str) -> dict[str, bytes | None]:
    """The content of the three lists and of the map of labels, by name; None for a list without images.

    validation, unseen: which images are for these, bool [N]; the others are for training.
    Raises SourceError for a path that no list can hold.
    """
    paths = [path if path.startswith("/") else prefix + path for path in listing.paths]
    for i, path in enumerate(paths[:1] if listing.is_gldv2 else paths):  # ids are fit, so all are if the folder is
        if UNFIT.search(path):
            raise SourceError(
                f"{listing.where(i)}: {path!a} cannot stand in a list (line break, white space at an end, or not UTF-8)"
            )
    by_label = np.argsort(listing.classes, kind="stable")  # within a class by path
    files: dict[str, bytes | None] = {}
    for name, wanted in ((TRAIN, ~(validation | unseen)), (VAL, validation), (UNSEEN, unseen)):
        chosen = by_label[wanted[by_label]]
        labels = listing.classes[chosen].tolist()
        lines = [f"{paths[i]} {label}\n" for i, label in zip(chosen.tolist(), labels, strict=True)]
        files[name] = "".join(lines).encode() or None
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["label", "landmark_id" if listing.is_gldv2 else "class", "images"])
    sizes = np.bincount(listing.classes, minlength=len(listing.class_names)).tolist()
    writer.writerows((label, name, sizes[label]) for label, name in enumerate(listing.class_names))
    files[LABELS] = table.getvalue().encode()
    return files


def write_files(out: str | os.PathLike, files: dict[str, bytes | None], *, force: bool) -> list[str]:
    """Write `files` to the folder `out`, where None stands for no such file; returns the names that changed.

    All are complete on the disk before the first gets its name. Raises SourceError if one is there with other content,
    unless `force`.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise SourceError(f"{folder}: a file; --out needs a folder")
    changed = [name for name, content in files.items() if _content(folder / name) != content]
    differing = [name for name in changed if (folder / name).exists()]
    if differing and not force:
        raise SourceError(
            f"{folder}: {' and '.join(differing)} would change; --force replaces them, --out names another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        contents = {name: content for name in changed if (content := files[name]) is not None}
        temporary = {name: _temporary(folder / name, content, stack) for name, content in contents.items()}
        for name in changed:
            if name in temporary:
                os.replace(temporary[name], folder / name)
            else:
                (folder / name).unlink()
    return changed


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _temporary(file: Path, content: bytes, stack: contextlib.ExitStack) -> str:
    """Write `content` under another name in the same folder, which `stack` removes if it is still there."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    stack.callback(Path(name).unlink, missing_ok=True)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)
    return name
