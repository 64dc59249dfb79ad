"""A landmark set: photographs and class numbers, named by a list file with one `path label` a line.

Paths are relative to the set's root (`<root>/<path>`); an absolute path stands for itself. A path may contain spaces:
the label is what follows the last white space.
"""

import os
import re
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from numpy.random import PCG64, Generator, SeedSequence

from datasets.batch_memory import Slot, WorkerMemory
from datasets.errors import DataError
from datasets.images.decode import ImageError, ImageFile
from datasets.missing import missing_files
from datasets.normalisation import note_on_path

_MOST_REPLACED = 1000  # broken images in a row: then it is the disk that is broken
_INTEGER = re.compile(r"[+-]?[0-9]+")
_MOST_DIGITS = 100


class ListError(DataError):
    """A list file that cannot be used; the message is one line: file, line number, mend."""


def read_list(
    list_file: str | os.PathLike, *, root: str | os.PathLike, num_classes: int | None = None
) -> tuple[list[str], np.ndarray]:
    """Paths (joined with `root`) and labels (int64 [N]) of a list file; entry i is line i + 1.

    Blank lines at the end are skipped, anywhere else refused. With `num_classes`, labels lie in 0..num_classes - 1.
    Raises ListError if the file is missing, empty, not UTF-8 text, or has a bad line. Whether the images exist is
    another question: see `check_files`.
    """
    lines = _read_text(list_file).rstrip().split("\n")
    if lines == [""]:
        raise ListError(f"{list_file}: the list is empty; it needs one `path label` a line")
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        path, label = _parse(line, f"{list_file}, line {number}", num_classes)
        paths.append(os.path.join(root, path))
        labels.append(label)
    return paths, np.array(labels, np.int64)


def _read_text(list_file: str | os.PathLike) -> str:
    try:
        with open(list_file, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise ListError(f"{list_file}: no such list file") from error
    except OSError as error:
        raise ListError(f"{list_file}: the list file cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ListError(f"{list_file}, line {line}: not UTF-8 text") from error


def _parse(line: str, where: str, num_classes: int | None) -> tuple[str, int]:
    fields = line.strip().rsplit(None, 1)
    if len(fields) == 0:
        raise ListError(f"{where}: a blank line between others; remove it")
    if len(fields) == 1:
        raise ListError(f"{where}: found {fields[0][:100]!r}, expected `path label`")
    path, label = fields
    if "\0" in path:
        raise ListError(f"{where}: the path {path[:200]!a} holds a zero byte, which no file's name can")
    if not _INTEGER.fullmatch(label):
        raise ListError(f"{where}: the label {label[:100]!r} is not an integer; expected `path label`")
    if len(label) > _MOST_DIGITS:  # int() would raise for thousands of them
        raise ListError(f"{where}: the label {label[:20]}... does not fit 64 bits")
    value = int(label)
    if value < 0:
        raise ListError(f"{where}: the label {value} is negative; labels start at 0")
    if num_classes is not None and value >= num_classes:
        raise ListError(
            f"{where}: the label {value} is out of range 0..{num_classes - 1}; "
            f"raise MODEL.NUM_CLASSES to at least {value + 1} or mend the list"
        )
    if value >= 2**63:
        raise ListError(f"{where}: the label {value} does not fit 64 bits")
    return path, value


def check_files(list_file: str | os.PathLike, paths: list[str]) -> None:
    """Raises ListError naming the first path of a list (entry i from line i + 1) that is no file."""
    missing = np.flatnonzero(missing_files(paths))
    if len(missing):
        raise ListError(
            f"{list_file}, line {missing[0] + 1}: no such image: {paths[missing[0]]} "
            f"({len(missing)} of {len(paths)} listed images missing){note_on_path(paths[missing[0]])}"
        )


class ArrayBatch(NamedTuple):
    """What the loader makes its `Batch` of, which has tensors instead: a worker does without PyTorch."""

    images: np.ndarray | Slot  # [B, S, S, 3]; in a worker it may be a slot of its memory
    labels: np.ndarray  # int64 [B]
    indices: np.ndarray  # int64 [B], lines of the list counted from 0
    shift: np.ndarray  # float32 [B, 3] BGR, the lighting of pixels in 0..1
    broken: list[str]  # a line for every image that could not be read, with `skip_broken`


class Transform(Protocol):
    """From a file to the network's input: float32 (exact) or uint8 (fast), see `transforms`."""

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> type: ...

    def write(self, file: ImageFile, rng: Generator, out: np.ndarray) -> np.ndarray:
        """Fill `out` [size, size, 3] of `dtype`, return the lighting still to be added, float32 [3]."""


class LandmarkDataset:
    """Batches of samples of a list file, each addressed by `(epoch, index)`, or `index` where nothing is random.

    A sample is a function of (seed, epoch, index) and of nothing else, so ranks and workers change nothing. An image
    that cannot be read makes an ImageError that names image, list file and line. It is RETURNED instead of the batch:
    raised in a worker it would reach the main process wrapped in a traceback; the loader raises it there.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        list_file: str | os.PathLike,
        *,
        transform: Transform,
        num_classes: int | None,
        seed: int,
        check: bool = True,
        skip_broken: bool = False,
    ) -> None:
        """Reads the list and, with `check`, looks whether all images exist. Raises ListError.

        With `skip_broken` the next image of the list that can be read, with its own label, index and draw, stands in
        for a broken one, and `Batch.broken` tells of it.
        """
        paths, self.labels = read_list(list_file, root=root, num_classes=num_classes)
        if check:
            check_files(list_file, paths)
        # One block of bytes instead of 1.58 million strings: it is handed to the workers in no time, and counting
        # references to a string writes to it, which would copy the page it lies on into every worker.
        encoded = [os.fsencode(path) for path in paths]
        self._paths = b"".join(encoded)
        self._offsets = np.cumsum([0, *map(len, encoded)])
        self._list_file, self._transform, self._seed, self._skip_broken = list_file, transform, seed, skip_broken
        self.worker: WorkerMemory | None = None  # that of the worker which this is in

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_bytes(self) -> int:
        """Of an image in a batch."""
        return 3 * self._transform.size**2 * np.dtype(self._transform.dtype).itemsize

    def source(self, index: int) -> str:
        """What messages call an image."""
        return self.path(index)

    def path(self, index: int) -> str:
        """The path of sample `index`, root included."""
        start, end = self._offsets[index], self._offsets[index + 1]
        return os.fsdecode(self._paths[start:end])

    def __getitem__(self, key: int | tuple[int, int]) -> ArrayBatch | ImageError:
        """A batch of one."""
        return self.__getitems__([key])

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> ArrayBatch | ImageError:
        """The batch of these keys."""
        shape, dtype = (len(keys), self._transform.size, self._transform.size, 3), self._transform.dtype
        slot = self.worker.take(shape, dtype) if self.worker else None
        pixels = slot.array() if slot else np.empty(shape, dtype)
        indices, shifts = [], []
        broken: list[str] = []
        for out, key in zip(pixels, keys, strict=True):
            epoch, index = key if isinstance(key, tuple) else (0, key)
            sample = self._write(epoch, index, out, broken)
            if isinstance(sample, ImageError):
                if slot:
                    slot.release()
                return sample
            indices.append(sample[0])
            shifts.append(sample[1])
        return ArrayBatch(slot or pixels, self.labels[indices], np.array(indices), np.stack(shifts), broken)

    def _write(self, epoch: int, index: int, out: np.ndarray, broken: list[str]) -> tuple[int, np.ndarray] | ImageError:
        """Fill `out` with sample `index` or what stands in for it; return the index that it is, and its lighting."""
        tries = min(len(self), _MOST_REPLACED) if self._skip_broken else 1
        for candidate in range(index, index + tries):
            candidate %= len(self)
            if self.worker:
                self.worker.begin(candidate)
            rng = Generator(PCG64(SeedSequence([self._seed, epoch, candidate])))
            try:
                return candidate, self._transform.write(ImageFile(self.path(candidate)), rng, out)
            except ImageError as error:
                message = f"{self._list_file}, line {candidate + 1}: {error}"
            except cv2.error as error:  # mostly memory
                reason = f"OpenCV cannot crop or resize it ({error.err})"
                message = f"{self._list_file}, line {candidate + 1}: {self.path(candidate)}: {reason}"
            broken.append(message)
        if tries == 1:
            return ImageError(message)
        return ImageError(f"{broken[-tries]} (nor can any of the {tries - 1} images after it be read)")
