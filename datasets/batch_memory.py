"""Memory that the main process shares with its loader workers: pixels of batches, and how far each worker is.

It is anonymous (memfd): /dev/shm, where containers have 64 MB or less, is not used. Its slots are used again and again:
the kernel clears new memory page by page as it is written, which costs more time than all of the published arithmetic
(2.5 times as much processor time a sample on a virtual machine). A worker writes into a slot that it has used before,
once nothing in the main process looks at it any more.
"""

import fcntl
import mmap
import os
import tempfile
import weakref

import numpy as np

SLOTS = 4  # a worker: two batches ahead, as the loader asks for, and two that the main process holds or held last


def anonymous_file() -> int:
    """The descriptor of an empty file that lies in memory (on Linux) and vanishes with its last descriptor."""
    if hasattr(os, "memfd_create"):
        return above_standard(os.memfd_create("loader", os.MFD_CLOEXEC))
    with tempfile.TemporaryFile() as file:
        return above_standard(os.dup(file.fileno()))


def above_standard(descriptor: int) -> int:
    """Move a descriptor away from those of stdin, stdout and stderr, which a process may be started without."""
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


class BatchMemory:
    """`SLOTS` slots of `size` bytes for each of the workers.

    Another process makes its own object of the same memory from `descriptor`.
    """

    def __init__(self, *, workers: int, size: int, descriptor: int | None = None) -> None:
        self.workers, self.size = workers, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        # Before the slots: two numbers a worker, how many images it has begun and which is the last; a byte a slot,
        # 1 from when a worker takes it until the main process has released it.
        head = -(-workers * (16 + SLOTS) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = head + workers * SLOTS * self.size
        self.descriptor = anonymous_file() if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, length)
        self._memory, self._head = mmap.mmap(self.descriptor, length), head
        self._begun = np.ndarray((workers, 2), np.int64, self._memory)
        self._busy = np.ndarray(workers * SLOTS, np.uint8, self._memory, offset=16 * workers)
        self._held: dict[int, weakref.ref] = {}  # in the main process: what has arrived, by slot

    def close(self) -> None:
        """Give the descriptor back; arrays that have arrived keep what they need."""
        os.close(self.descriptor)

    def begin(self, worker: int, index: int) -> None:
        """In a worker: tell that it begins with this image."""
        self._begun[worker] = self._begun[worker, 0] + 1, index

    def begun(self, worker: int) -> tuple[int, int]:
        """How many images a worker has begun, and the index of the last."""
        count, index = self._begun[worker].tolist()
        return count, index

    def take(self, worker: int, shape: tuple[int, ...], dtype: type) -> "Slot | None":
        """In a worker: the first of its slots that is free; None if none is, or the array is too large for one."""
        if int(np.prod(shape)) * np.dtype(dtype).itemsize > self.size:
            return None
        for number in range(worker * SLOTS, (worker + 1) * SLOTS):
            if not self._busy[number]:
                self._busy[number] = 1
                return Slot(self, number, shape, np.dtype(dtype).str)
        return None

    def array(self, number: int, shape: tuple[int, ...], dtype: type | str) -> np.ndarray:
        """The contents of a slot."""
        return np.ndarray(shape, dtype, buffer=self._memory, offset=self._head + number * self.size)

    def release(self, number: int) -> None:
        self._busy[number] = 0

    def arrived(self, number: int, shape: tuple[int, ...], dtype: type | str) -> np.ndarray:
        """In the main process: the array of a slot, which is taken until it and all of its views are gone.

        Slots whose array is gone are released now. A callback of the reference would do so earlier, but Python drops
        an interrupt that comes during one.
        """
        for earlier, held in list(self._held.items()):
            if held() is None:
                del self._held[earlier]
                self.release(earlier)
        array = self.array(number, shape, dtype)
        self._held[number] = weakref.ref(array)
        return array


class Slot:
    """An array in a slot. Only its place is sent to the main process (`messages.py`)."""

    def __init__(self, memory: BatchMemory, number: int, shape: tuple[int, ...], dtype: str) -> None:
        self._memory, self.place = memory, (number, shape, dtype)

    def array(self) -> np.ndarray:
        return self._memory.array(*self.place)

    def release(self) -> None:
        self._memory.release(self.place[0])


class WorkerMemory:
    """A worker's own part of the memory."""

    def __init__(self, memory: BatchMemory, worker: int) -> None:
        self._memory, self._worker = memory, worker

    def take(self, shape: tuple[int, ...], dtype: type) -> Slot | None:
        return self._memory.take(self._worker, shape, dtype)

    def begin(self, index: int) -> None:
        self._memory.begin(self._worker, index)
