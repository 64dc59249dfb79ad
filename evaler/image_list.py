"""Images in order, each known by its name, and their bytes wherever these lie."""

import hashlib
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from datasets.image import ImageError, read_file
from datasets.normalisation import note_on_path

Box = tuple[float, float, float, float]
THREADS = 16  # of those that ask for sizes: on a network disk nearly all of the time is waiting
BLOCK = 4096  # images that are asked for, or hashed, at once


class Files(Protocol):
    """Where the images of a list lie; all of it works in forked and spawned processes."""

    def source(self, index: int) -> str:
        """What messages call an image."""

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises `ImageError`."""

    def sizes(self) -> np.ndarray:
        """Bytes of every file, int64 [N]; -1 for one that is missing."""


class ImageList:
    """Images by name, in order, and the part of each that counts (None: all of it)."""

    def __init__(self, names: list[str], files: Files, boxes: Sequence[Box | None] | None = None) -> None:
        assert boxes is None or len(boxes) == len(names)
        self.names, self._files, self._boxes = names, files, boxes

    def __len__(self) -> int:
        return len(self.names)

    def box(self, index: int) -> Box | None:
        """x1, y1, x2, y2 in pixels."""
        return None if self._boxes is None else self._boxes[index]

    def source(self, index: int) -> str:
        """What messages call the image: its path, or `ARCHIVE: MEMBER`."""
        return self._files.source(index)

    def read(self, index: int) -> bytes:
        """The bytes of the image's file. Raises `ImageError` for one that cannot be read."""
        return self._files.read(index)

    def sha256(self, *, missing_ok: bool = False) -> str:
        """Of names, boxes and file sizes, so that it changes with the list and (nearly always) with the pictures.

        Raises `ImageError` for files that are missing; with `missing_ok` their size is -1.
        """
        sizes = self._files.sizes()
        missing = np.flatnonzero(sizes < 0)
        if len(missing) and not missing_ok:
            first = self.source(int(missing[0]))
            counted = f"{len(missing)} of {len(self)} images missing"
            raise ImageError(f"{first}: no such image ({counted}){note_on_path(first)}")
        digest = hashlib.sha256()
        rows = zip(self.names, self._boxes or itertools.repeat(None), sizes.tolist())  # noqa: B905 repeat has no end
        while block := "".join(f"{name}\t{box}\t{size}\n" for name, box, size in itertools.islice(rows, BLOCK)):
            digest.update(block.encode())
        return digest.hexdigest()


class LooseFiles:
    """Image `name` is the file FOLDER/name + suffix; with an empty folder name + suffix itself."""

    def __init__(self, folder: str | os.PathLike, names: list[str], *, suffix: str = "") -> None:
        self._folder, self._names, self._suffix = os.fspath(folder), names, suffix

    def source(self, index: int) -> str:
        return os.path.join(self._folder, self._names[index] + self._suffix)

    def read(self, index: int) -> bytes:
        return read_file(self.source(index))

    def sizes(self) -> np.ndarray:
        starts = range(0, len(self._names), BLOCK)
        if len(starts) < 2:
            return np.array(self._sizes(0), np.int64)
        with ThreadPoolExecutor(THREADS) as threads:
            return np.concatenate([np.array(sizes, np.int64) for sizes in threads.map(self._sizes, starts)])

    def _sizes(self, start: int) -> list[int]:
        return [_size(self.source(index)) for index in range(start, min(start + BLOCK, len(self._names)))]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # a name with a zero byte
        return -1
