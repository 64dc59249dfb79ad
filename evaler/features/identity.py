"""What a descriptor was made from, so that it need not be made again: the bytes of a file, and what is cut out of them.

A record is 48 bytes an image. Its first 32 are the identity: the sha256 of the file's bytes, and of the box if there is
one. The other 16 are a stamp: a digest of what the file system told of the file (size, both times of change, inode)
before it was read. An equal stamp means equal bytes without reading them: no program can set the time of the last
change of status, which every write moves. Where stamps differ (a copy, a `touch`) the bytes are hashed and decide.
Zeros stand for what is not known: the bytes of a file that could not be read, and the stamp of a file that had changed
so recently that it could change again without showing it.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from core.base.progress import bar
from datasets.images.decode import ImageError
from evaler.sources.image_list import THREADS, ImageList

IDENTITY_BYTES, STAMP_BYTES = 32, 16
RECORD_BYTES = IDENTITY_BYTES + STAMP_BYTES
# The coarsest clock of a file system counts in steps of 2 seconds; the clocks of two machines may differ.
TOO_RECENT = 10 * 10**9  # nanoseconds


class Identities:
    """The images of a list as they are now. part: of an image, what else its descriptor depends on (empty: nothing)."""

    def __init__(self, images: ImageList, stat: np.ndarray, part: Callable[[int], str]) -> None:
        """stat: int64 [N, 4], of `ImageList.stat`, made before any of the images is read."""
        self._images, self._part = images, part
        self.missing = stat[:, 0] < 0
        self.stamps = np.zeros((len(stat), STAMP_BYTES), np.uint8)
        rows, width = np.ascontiguousarray(stat).tobytes(), stat.shape[1] * 8
        for index in np.flatnonzero(~self.missing & (stat[:, 2] < time.time_ns() - TOO_RECENT)).tolist():
            entry = rows[index * width : (index + 1) * width] + part(index).encode()
            self.stamps[index] = np.frombuffer(hashlib.blake2b(entry, digest_size=STAMP_BYTES).digest(), np.uint8)

    def record(self, index: int, sha256: bytes) -> np.ndarray:
        """uint8 [48] of an image whose bytes have this sha256; empty where they could not be read."""
        record = np.zeros(RECORD_BYTES, np.uint8)
        if sha256:
            record[:IDENTITY_BYTES] = np.frombuffer(self._identity(index, sha256), np.uint8)
            record[IDENTITY_BYTES:] = self.stamps[index]
        return record

    def stamped(self, index: int, identity: np.ndarray) -> np.ndarray:
        """uint8 [48] of an image that has been found to be the same."""
        return np.concatenate([identity, self.stamps[index]])

    def same(self, indices: Sequence[int] | np.ndarray, records: np.ndarray, *, title: str = "") -> np.ndarray:
        """Which images (bool [n]) are what their records (uint8 [n, 48]) tell; files are read where stamps differ.

        An image of unknown bytes is the same as long as it cannot be read. title: of a bar, if it takes long.
        """
        indices = np.asarray(indices, np.int64)
        stamps = self.stamps[indices]
        known = records[:, :IDENTITY_BYTES].any(axis=1)
        same = known & stamps.any(axis=1) & (records[:, IDENTITY_BYTES:] == stamps).all(axis=1)
        same |= ~known & self.missing[indices]
        doubtful = np.flatnonzero(~same & ~self.missing[indices])
        if len(doubtful):
            with ThreadPoolExecutor(THREADS) as threads:
                identities = threads.map(self._identity_now, indices[doubtful].tolist())
                shown = bar(
                    identities, title, unit="image", total=len(doubtful), delay=2, leave=False, disable=not title
                )
                for place, identity in zip(doubtful.tolist(), shown, strict=True):
                    same[place] = identity == records[place, :IDENTITY_BYTES].tobytes()
        return same

    def restamped(self, records: np.ndarray) -> np.ndarray:
        """The records (uint8 [N, 48]) of images that are the same, with the stamps of now."""
        stamps = np.where(records[:, :IDENTITY_BYTES].any(axis=1, keepdims=True), self.stamps, 0)
        return np.concatenate([records[:, :IDENTITY_BYTES], stamps.astype(np.uint8)], axis=1)

    def _identity_now(self, index: int) -> bytes:
        try:
            return self._identity(index, hashlib.sha256(self._images.read(index)).digest())
        except ImageError:
            return bytes(IDENTITY_BYTES)

    def _identity(self, index: int, sha256: bytes) -> bytes:
        part = self._part(index)
        return hashlib.sha256(sha256 + part.encode()).digest() if part else sha256
