"""Which samples make a batch, and the worker processes that load them.

The order of an epoch is a function of (seed, epoch). Global batch b is entries b B .. (b + 1) B - 1 of that order and
every rank takes a contiguous share of it: a run sees the same global batches on any number of devices.
"""

import atexit
import signal
import sys
import weakref
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.image import ImageError


def epoch_order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: int64 [n], a permutation of 0..n - 1."""
    # SeedSequence pads with zeros: without the spawn key this would be the stream of sample (seed, epoch, 0).
    stream = SeedSequence([seed, epoch], spawn_key=(1,))
    return Generator(PCG64(stream)).permutation(n)


class TrainBatches:
    """This rank's share of every global batch of an epoch, as lists of keys (epoch, index).

    `batch_size` is the global one, B. The last n mod B samples of an epoch's order are left out: every step sees a
    full batch, and other samples are left out in the next epoch.
    """

    def __init__(self, n: int, *, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        """Raises ValueError if the batch is larger than the set or does not divide among `world` processes."""
        assert 0 <= rank < world, (rank, world)
        if not 1 <= batch_size <= n:
            raise ValueError(f"TRAIN.BATCH_SIZE {batch_size}: must be from 1 to the number of training images, {n}")
        if batch_size % world:
            raise ValueError(f"TRAIN.BATCH_SIZE {batch_size}: does not divide among {world} processes")
        self.per_epoch = n // batch_size
        self._n, self._batch_size, self._seed, self._rank, self._world = n, batch_size, seed, rank, world
        self._epoch, self._start = 0, 0

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Choose the epoch of the next iteration, and its first batch (to go on inside an epoch)."""
        assert 0 <= start <= self.per_epoch, (start, self.per_epoch)
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return self.per_epoch - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, share = self._epoch, self._batch_size // self._world
        order = epoch_order(self._n, seed=self._seed, epoch=epoch)
        for batch in range(self._start, self.per_epoch):
            first = batch * self._batch_size + self._rank * share
            yield [(epoch, index) for index in order[first : first + share].tolist()]


class TestBatches:
    """This rank's indices rank, rank + world, ... in batches: over all ranks every image exactly once, no padding.

    `batch_size` is the global one. The last batch may be smaller; a rank may have one batch more than another, or none.
    """

    def __init__(self, n: int, *, batch_size: int, rank: int = 0, world: int = 1) -> None:
        assert 0 <= rank < world, (rank, world)
        if batch_size < 1:
            raise ValueError(f"TEST.BATCH_SIZE {batch_size}: must be at least 1")
        self._indices = range(rank, n, world)
        self._share = max(1, batch_size // world)

    def __len__(self) -> int:
        return -(-len(self._indices) // self._share)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self._indices), self._share):
            yield list(self._indices[first : first + self._share])


class ImageLoader(DataLoader):
    """Yields (images float32 [B, 3, S, S], labels int64 [B], indices int64 [B]).

    An image that cannot be read is raised here, in the main process, as the plain ImageError.
    """

    _ends_with_process = False

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        iterator = super().__iter__()  # the first time this starts the workers
        if self.num_workers and not self._ends_with_process:
            self._ends_with_process = True
            atexit.register(_shut_down, weakref.ref(iterator))
        for batch in iterator:
            if isinstance(batch, ImageError):
                raise batch
            yield batch


def make_loader(
    dataset: Dataset, batches: TrainBatches | TestBatches, *, workers: int, pin_memory: bool
) -> ImageLoader:
    """A loader over `batches`; `workers` processes live as long as it does, 0 loads in this process.

    Workers are forked (on Linux), also where Python's own default is another: they share the path table instead of
    copying it and start in milliseconds. CUDA being initialised does no harm: they use NumPy and OpenCV only and
    never touch it.
    """
    return ImageLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_init_worker,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # its base seed (unused) is not drawn from the global generator
    )


def _collate(samples: list) -> list[torch.Tensor] | ImageError:
    error = next((sample for sample in samples if isinstance(sample, ImageError)), None)
    return default_collate(samples) if error is None else error


def _shut_down(reference: weakref.ref) -> None:
    # After Ctrl-C or an error. PyTorch by itself may leave this to the end of the interpreter, where threads no longer
    # run: workers are then not told to stop, are waited for in vain (5 s each) and print tracebacks of broken pipes.
    iterator = reference()
    if iterator is not None:
        iterator._shutdown_workers()


def _init_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group: the main process handles it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread a worker (PyTorch sets its own count to 1). 0 switches OpenCV's thread pool off; any other number
    # would first wait for the pool's threads to end, which a forked process does not have: it hangs.
    cv2.setNumThreads(0)
