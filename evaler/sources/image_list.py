"""Images in order, each known by its name, and their bytes wherever these lie."""

import hashlib
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from datasets.images.decode import MAX_PIXELS, ImageError, decode, read_file
from datasets.normalisation import note_on_path

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", np.ndarray, "Tensor")
Box = tuple[float, float, float, float]
THREADS = 16  # of those that ask for sizes: on a network disk nearly all of the time is waiting
BLOCK = 4096  # images that are asked for, or hashed, at once


class Files(Protocol):
    """Where the images of a list lie; all of it works in forked and spawned processes."""

    def source(self, index: int) -> str:
        """What messages call an image."""

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises `ImageError`."""

    def stat(self) -> np.ndarray:
        """Of every file, int64 [N, 4]: bytes (-1: it is missing), times of change of content and status, inode."""


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

    def stat(self) -> np.ndarray:
        """What the file system tells of every file, int64 [N, 4]: bytes (-1: missing), mtime_ns, ctime_ns, inode."""
        return self._files.stat()

    def sha256(self, *, missing_ok: bool = False, stat: np.ndarray | None = None) -> str:
        """Of names, boxes and file sizes (those of `stat`, if it is given): the same wherever a copy of them lies.

        Raises `ImageError` for files that are missing; with `missing_ok` their size is -1.
        """
        sizes = (self.stat() if stat is None else stat)[:, 0]
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


def read_cropped(
    images: ImageList, index: int, *, max_pixels: int = MAX_PIXELS, data: bytes | None = None
) -> np.ndarray:
    """Decode an image (`data`, if its bytes are read already) and cut its box out: uint8 [H, W, 3] BGR.

    Raises `ImageError`.
    """
    source, box = images.source(index), images.box(index)
    image = crop(decode(source, images.read(index) if data is None else data, max_pixels=max_pixels), box)
    if image.size == 0:
        raise ImageError(f"{source}: the query's box {box} lies outside the picture")
    return image


def crop(image: Array, box: Sequence[float] | None) -> Array:
    """Cut the box (x1, y1, x2, y2 in pixels, truncated to integers as published) out of [H, W, 3]; None keeps all."""
    if box is None:
        return image
    x1, y1, x2, y2 = (int(side) for side in box)
    return image[y1:y2, x1:x2]


class LooseFiles:
    """Image `name` is the file FOLDER/name + suffix; with an empty folder name + suffix itself."""

    def __init__(self, folder: str | os.PathLike, names: list[str], *, suffix: str = "") -> None:
        self._folder, self._names, self._suffix = os.fspath(folder), names, suffix

    def source(self, index: int) -> str:
        return os.path.join(self._folder, self._names[index] + self._suffix)

    def read(self, index: int) -> bytes:
        return read_file(self.source(index))

    def stat(self) -> np.ndarray:
        starts = range(0, len(self._names), BLOCK)
        if len(starts) < 2:
            return self._stat(0)
        with ThreadPoolExecutor(THREADS) as threads:
            return np.concatenate(list(threads.map(self._stat, starts)))

    def _stat(self, start: int) -> np.ndarray:
        stop = min(start + BLOCK, len(self._names))
        return np.array([stat(self.source(index)) for index in range(start, stop)], np.int64).reshape(-1, 4)


def stat(path: str) -> tuple[int, int, int, int]:
    """Bytes, times of change of content and status (ns), inode; -1 and zeros for a file that is missing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the latter for a NUL in the path
        return -1, 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (2**63 - 1)
