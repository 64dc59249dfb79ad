"""Memory in which workers hand the pixels of batches over, used again and again.

PyTorch allocates shared memory anew for every batch. The kernel clears it page by page as it is written, which costs
more time than all of the published arithmetic (2.5 times as much processor time a sample on a virtual machine). Here a
worker writes into a slot that it has used before, once nothing in the main process looks at it any more.
"""

import itertools
import mmap
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SLOTS = 4  # a worker: two batches ahead, as the loader asks for, and two that the main process holds or held last
_keys = itertools.count()
_memories: weakref.WeakValueDictionary[int, "BatchMemory"] = weakref.WeakValueDictionary()


class BatchMemory:
    """`SLOTS` slots of `size` bytes for each of the workers, which must be forked after this was made."""

    def __init__(self, *, workers: int, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, workers * SLOTS * self.size)
        # A byte a slot, 1 from when a worker takes it until the main process has released it.
        self._busy = np.frombuffer(mmap.mmap(-1, workers * SLOTS), np.uint8)
        self._held: dict[int, weakref.ref] = {}  # in the main process: what has arrived, by slot
        self._key = next(_keys)
        _memories[self._key] = self

    def take(self, worker: int, shape: tuple[int, ...], dtype: type) -> "Slot | None":
        """In a worker: the first of its slots that is free; None if none is, or the array is too large for one."""
        if int(np.prod(shape)) * np.dtype(dtype).itemsize > self.size:
            return None
        for number in range(worker * SLOTS, (worker + 1) * SLOTS):
            if not self._busy[number]:
                self._busy[number] = 1
                return Slot(self._key, number, shape, dtype)
        return None

    def array(self, number: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """The contents of a slot."""
        return np.ndarray(shape, dtype, buffer=self._memory, offset=number * self.size)

    def release(self, number: int) -> None:
        self._busy[number] = 0

    def arrived(self, number: int, shape: tuple[int, ...], dtype: type) -> Tensor:
        """In the main process: the tensor of a slot; it and all of its views hold the array that is made here.

        Slots whose array is gone are released now. A callback of the reference would do so earlier, but Python drops
        an interrupt that comes during one.
        """
        for earlier, held in list(self._held.items()):
            if held() is None:
                del self._held[earlier]
                self.release(earlier)
        array = self.array(number, shape, dtype)
        self._held[number] = weakref.ref(array)
        return torch.from_numpy(array)


class Slot:
    """An array in a slot. It is sent to the main process as its number, and arrives there as a tensor."""

    def __init__(self, key: int, number: int, shape: tuple[int, ...], dtype: type) -> None:
        self._place = key, number, shape, dtype

    def array(self) -> np.ndarray:
        key, *place = self._place
        return _memories[key].array(*place)

    def release(self) -> None:
        key, number, *_ = self._place
        _memories[key].release(number)

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple]:
        return _arrived, self._place


def _arrived(key: int, *place) -> Tensor:
    # Run wherever a message is unpickled, also when the loader throws it away (an abandoned iteration).
    return _memories[key].arrived(*place)
