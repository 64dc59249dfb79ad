"""Which samples make a batch, and the worker processes that load them.

The order of an epoch is a function of (seed, epoch). Global batch b is entries b B .. (b + 1) B - 1 of that order and
every rank takes a contiguous share of it: a run sees the same global batches on any number of devices.
"""

import atexit
import ctypes
import signal
import sys
import weakref
from collections.abc import Iterator
from multiprocessing.util import Finalize

import cv2
import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.image import ImageError
from datasets.landmark import Batch, LandmarkDataset

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_LAST_SECONDS = 60  # of a worker after SIGTERM: the run has saved and ended by then
SAMPLINGS = ("uniform", "class_balanced")


def epoch_order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: int64 [n], a permutation of 0..n - 1."""
    return _generator(seed, epoch, 1).permutation(n)


def class_balanced_order(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """An epoch of n = len(labels) samples in which every class that has images is seen equally often: int64 [n].

    It goes through all classes in a random order, then through all in another, and so on; the last pass is cut off at
    n. Pass p takes image p (modulo their number) of a random order of the class's images: none of them comes again
    before all of them came.
    """
    n, rng = len(labels), _generator(seed, epoch, 2)
    shuffled = rng.permutation(n)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    passes = -(-n // len(first))
    classes = np.tile(np.arange(len(first)), (passes, 1))
    rng.permuted(classes, axis=1, out=classes)
    images = first[classes] + np.arange(passes)[:, None] % count[classes]
    return by_class[images.reshape(-1)[:n]]


def _generator(seed: int, epoch: int, purpose: int) -> Generator:
    # SeedSequence pads with zeros: without the spawn key this would be the stream of sample (seed, epoch, 0).
    return Generator(PCG64(SeedSequence([seed, epoch], spawn_key=(purpose,))))


class TrainBatches:
    """This rank's share of every global batch of an epoch, as lists of keys (epoch, index).

    `batch_size` is the global one, B. The last n mod B samples of an epoch's order are left out: every step sees a
    full batch, and other samples are left out in the next epoch.
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        sampling: str = "uniform",
        labels: np.ndarray | None = None,
    ) -> None:
        """Sampling `class_balanced` needs the labels, int64 [n].

        Raises ValueError if the batch is larger than the set or does not divide among `world` processes.
        """
        assert 0 <= rank < world, (rank, world)
        assert sampling in SAMPLINGS, sampling
        assert sampling == "uniform" or len(labels) == n, (n, labels)
        if not 1 <= batch_size <= n:
            raise ValueError(f"TRAIN.BATCH_SIZE {batch_size}: must be from 1 to the number of training images, {n}")
        if batch_size % world:
            raise ValueError(f"TRAIN.BATCH_SIZE {batch_size}: does not divide among {world} processes")
        self.per_epoch = n // batch_size
        self._n, self._batch_size, self._seed, self._rank = n, batch_size, seed, rank
        self.share = batch_size // world  # samples in a batch of this rank
        self._labels = labels if sampling == "class_balanced" else None
        self._epoch, self._start = 0, 0
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch last asked for

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Choose the epoch of the next iteration, and its first batch (to go on inside an epoch)."""
        assert 0 <= start <= self.per_epoch, (start, self.per_epoch)
        self._epoch, self._start = epoch, start

    def order(self, epoch: int) -> np.ndarray:
        """The indices of an epoch in their order: int64 [n]."""
        if self._order is None or self._order[0] != epoch:
            if self._labels is None:
                order = epoch_order(self._n, seed=self._seed, epoch=epoch)
            else:
                order = class_balanced_order(self._labels, seed=self._seed, epoch=epoch)
            self._order = epoch, order
        return self._order[1]

    def __len__(self) -> int:
        return self.per_epoch - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, share = self._epoch, self.share
        order = self.order(epoch)
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
        self.share = max(1, batch_size // world)

    def __len__(self) -> int:
        return -(-len(self._indices) // self.share)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self._indices), self.share):
            yield list(self._indices[first : first + self.share])


class ImageLoader(DataLoader):
    """Yields a `Batch`. An image that cannot be read is raised here, in the main process, as the plain ImageError.

    An iteration may be abandoned anywhere: the next one begins where `set_epoch` says, also with workers, which first
    finish the few batches that they have begun.
    """

    _ends_with_process = False

    def __iter__(self) -> Iterator[Batch]:
        iterator = super().__iter__()  # the first time this starts the workers
        if self.num_workers and not self._ends_with_process:
            self._ends_with_process = True
            # Before PyTorch's own atexit handler, after which it shuts nothing down. A process that multiprocessing has
            # started does not come to atexit: there it is done before its queues close (priority 10).
            atexit.register(_shut_down, weakref.ref(iterator))
            Finalize(None, _shut_down, args=(weakref.ref(iterator),), exitpriority=100)
        for batch in iterator:
            if isinstance(batch, ImageError):
                self.close()
                raise batch
            if isinstance(batch, Batch) and batch.images.is_floating_point():
                batch = batch._replace(images=batch.images.permute(0, 3, 1, 2))
            yield batch

    def close(self) -> None:
        """End the workers; another iteration starts new ones.

        Left to the garbage collector with a traceback that holds them, workers are not told to stop and are waited for
        in vain, 5 s each.
        """
        if self.num_workers and self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator, self._ends_with_process = None, False


def make_loader(
    dataset: Dataset, batches: TrainBatches | TestBatches, *, workers: int, pin_memory: bool
) -> ImageLoader:
    """A loader over `batches`; `workers` processes live as long as it does, 0 loads in this process.

    Workers are forked (on Linux), also where Python's own default is another: they share the path table instead of
    copying it and start in milliseconds. CUDA being initialised does no harm: they use NumPy and OpenCV only and
    never touch it.
    """
    fork = workers > 0 and sys.platform == "linux"
    if fork and isinstance(dataset, LandmarkDataset):
        dataset.use_batch_memory(workers=workers, batch_size=batches.share)
    return ImageLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_init_worker,
        multiprocessing_context="fork" if fork else None,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # its base seed (unused) is not drawn from the global generator
    )


def _collate(samples: Batch | ImageError | list) -> object:
    """A LandmarkDataset makes whole batches; the samples of any other set are put together as usual."""
    return default_collate(samples) if isinstance(samples, list) else samples


def _shut_down(reference: weakref.ref) -> None:
    # After Ctrl-C or an error. PyTorch by itself may leave this to the end of the interpreter, where threads no longer
    # run: workers are then not told to stop, are waited for in vain (5 s each) and print tracebacks of broken pipes.
    iterator = reference()
    if iterator is not None:
        iterator._shutdown_workers()


def _init_worker(worker: int) -> None:
    # Ctrl-C, and SIGTERM from SLURM, reach the whole process group: the main process handles them and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_once)
    if sys.platform == "linux":  # nobody is left to end a worker whose main process was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # One thread a worker (PyTorch sets its own count to 1). 0 switches OpenCV's thread pool off; any other number
    # would first wait for the pool's threads to end, which a forked process does not have: it hangs.
    cv2.setNumThreads(0)
    _keep_memory()


def _outlive_once(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # the next one may come from the main process, to end a worker that hangs
    signal.alarm(_LAST_SECONDS)  # or this one did


def _keep_memory() -> None:
    # glibc gives the memory of every large array back to the kernel when it is freed, and the next one costs a fault
    # and a cleared page for each 4 KiB: more time than all arithmetic of a sample. 32 MiB is the most it allows.
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
