"""Images that are read out of tar archives without unpacking them."""

import os

import numpy as np

from datasets.images.decode import MAX_BYTES, ImageError, too_many_bytes
from evaler.sources.image_list import stat
from evaler.sources.tar_index import Archive, TarIndex


class TarFiles:
    """Image i is the member i of an index.

    One archive is kept open, that of the image read last: neighbours in the list mostly lie in the same. Reading moves
    no common position, so that forked processes and threads can use one descriptor at once.
    """

    def __init__(self, index: TarIndex) -> None:
        self._index = index
        self._ends = np.cumsum([archive.images for archive in index.archives])
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}  # a process that is not a fork opens its own

    def source(self, index: int) -> str:
        return f"{self._archive(index).path}: {self._index.names[index]}"

    def stat(self) -> np.ndarray:
        """Of a member its size, and else what is told of its archive."""
        of_archives = np.array([stat(archive.path) for archive in self._index.archives], np.int64).reshape(-1, 4)
        of_members = np.repeat(of_archives, [archive.images for archive in self._index.archives], axis=0)
        of_members[:, 0] = self._index.sizes
        return of_members

    def read(self, index: int) -> bytes:
        archive, size = self._archive(index), int(self._index.sizes[index])
        if size == 0:
            raise ImageError(f"{self.source(index)}: the file is empty")
        if size > MAX_BYTES:
            raise ImageError(f"{self.source(index)}: {too_many_bytes(size)}")
        try:
            opened = self._opened  # of our own from here on: another thread may put another one in its place
            if opened is None or opened.archive is not archive:
                opened = self._opened = _Opened(archive)
            data = opened.read(int(self._index.offsets[index]), size)
        except OSError as error:
            raise ImageError(f"{self.source(index)}: cannot be read ({error.strerror})") from error
        if not opened.as_indexed or len(data) < size:
            raise ImageError(f"{self.source(index)}: the archive has changed since it was indexed; start again")
        return data

    def _archive(self, index: int) -> Archive:
        return self._index.archives[int(np.searchsorted(self._ends, index, side="right"))]


class _Opened:
    """An archive that is open until nobody refers to it."""

    def __init__(self, archive: Archive) -> None:
        self.archive, self._descriptor = archive, -1
        self._descriptor = os.open(archive.path, os.O_RDONLY)
        status = os.fstat(self._descriptor)
        self.as_indexed = (status.st_size, status.st_mtime_ns) == (archive.size, archive.mtime_ns)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes, less only at the end of the file."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data
