"""Slots of shared memory: written again only when nothing looks at them, and never lost."""

import gc
import os

import numpy as np
import pytest
import torch

from datasets.batch_memory import SLOTS, BatchMemory, Slot

OTHER = 2  # a worker of whom only `free` makes use


def arrive(memory: BatchMemory, slot: Slot) -> torch.Tensor:
    return torch.from_numpy(memory.arrived(*slot.place))


def free(memory: BatchMemory, worker: int) -> int:
    """How many slots of this worker are free once a batch of another one has arrived."""
    arrive(memory, memory.take(OTHER, (1,), np.uint8))
    taken = [memory.take(worker, (1,), np.uint8) for _ in range(SLOTS + 1)]
    assert taken[-1] is None
    for slot in filter(None, taken):
        slot.release()
    return sum(slot is not None for slot in taken)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_a_slot_holds_arrives(dtype):
    memory = BatchMemory(workers=3, size=4 * 5 * 7)
    tensors = []
    for worker in (1, 0, 1):
        slot = memory.take(worker, (5, 7), dtype)
        slot.array()[:] = np.arange(35).reshape(5, 7) + len(tensors)
        tensors.append(arrive(memory, slot))
    for i, tensor in enumerate(tensors):
        assert tensor.dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
        assert tensor.tolist() == (np.arange(35).reshape(5, 7) + i).tolist()


def test_a_slot_is_free_when_the_last_view_of_it_is_gone():
    memory = BatchMemory(workers=3, size=100)
    assert free(memory, 0) == SLOTS
    tensor = arrive(memory, memory.take(0, (10, 10), np.uint8))
    views = [tensor.permute(1, 0)[2:], tensor.numpy()[1:]]
    assert free(memory, 0) == SLOTS - 1
    assert free(memory, 1) == SLOTS
    del tensor
    gc.collect()
    assert free(memory, 0) == SLOTS - 1
    views.pop(0)
    assert free(memory, 0) == SLOTS - 1
    views.pop()
    assert free(memory, 0) == SLOTS


def test_too_large_an_array_gets_no_slot():
    memory = BatchMemory(workers=3, size=5000)
    assert memory.take(0, (memory.size // 4 + 1,), np.float32) is None
    assert free(memory, 0) == SLOTS


def test_another_process_writes_where_this_one_reads():
    memory = BatchMemory(workers=3, size=100)
    child = os.fork()
    if child == 0:
        theirs = BatchMemory(workers=3, size=100, descriptor=memory.descriptor)
        theirs.take(0, (3,), np.uint8).array()[:] = (7, 8, 9)
        theirs.begin(0, 5)
        theirs.begin(0, 11)
        os._exit(0)
    os.waitpid(child, 0)
    memory.close()
    assert [memory.begun(worker) for worker in range(3)] == [(2, 11), (0, 0), (0, 0)]
    assert memory.array(0, (3,), np.uint8).tolist() == [7, 8, 9]
    assert free(memory, 0) == SLOTS - 1
