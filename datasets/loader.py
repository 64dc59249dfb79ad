"""Which samples make a batch, and the worker processes that load them.

The order of an epoch is a function of (seed, epoch). Global batch b is entries b B .. (b + 1) B - 1 of that order and
every rank takes a contiguous share of it: a run sees the same global batches on any number of devices.
"""

from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from torch import Tensor

from datasets.errors import DataError
from datasets.images.decode import ImageError
from datasets.landmark import ArrayBatch, LandmarkDataset
from datasets.worker import Loadable
from datasets.workers import Workers

D = TypeVar("D", bound=Loadable)
B = TypeVar("B", bound=Iterable[list])
TIMEOUT = 60.0  # seconds that an image may take a worker
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

        Raises DataError if the batch is larger than the set or does not divide among `world` processes.
        """
        assert 0 <= rank < world, (rank, world)
        assert sampling in SAMPLINGS, sampling
        assert sampling == "uniform" or (labels is not None and len(labels) == n), (n, labels)
        if not 1 <= batch_size <= n:
            raise DataError(f"TRAIN.BATCH_SIZE {batch_size}: must be from 1 to the number of training images, {n}")
        if batch_size % world:
            raise DataError(f"TRAIN.BATCH_SIZE {batch_size}: does not divide among {world} processes")
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
            raise DataError(f"TEST.BATCH_SIZE {batch_size}: must be at least 1")
        self._indices = range(rank, n, world)
        self.share = max(1, batch_size // world)

    def __len__(self) -> int:
        return -(-len(self._indices) // self.share)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self._indices), self.share):
            yield list(self._indices[first : first + self.share])


class Batch(NamedTuple):
    """What the loader yields. Exact: images are normalised and `shift` is zero; fast: both are left to the device."""

    images: Tensor  # exact: float32 [B, 3, S, S] in channels_last order; fast: uint8 [B, S, S, 3] BGR
    labels: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], lines of the list counted from 0
    shift: Tensor  # float32 [B, 3] BGR, the lighting of pixels in 0..1
    broken: list[str]  # a line for every image that could not be read, with `skip_broken`


class ImageLoader(Generic[D, B]):
    """Yields a `Batch` of tensors, or whatever items another data set makes, for every list of keys in `batches`.

    An image that cannot be read is raised here, in the main process, as the plain ImageError. An iteration may be
    abandoned anywhere: the next one begins where `set_epoch` says, also with workers.
    """

    def __init__(self, dataset: D, batches: B, *, workers: int, slot: int, pin_memory: bool, timeout: float) -> None:
        self.dataset, self.batch_sampler, self.num_workers, self.pin_memory = dataset, batches, workers, pin_memory
        self._slot, self._timeout = slot, timeout
        self._workers: Workers | None = None

    def __len__(self) -> int:
        assert isinstance(self.batch_sampler, Sized), "batches that nobody has counted"
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        items: Iterator[object] = map(_tensors, self._items())
        if self.pin_memory:
            items = self._pinned(items)
        try:
            for item in items:
                if isinstance(item, ImageError):
                    raise item
                yield item
        except GeneratorExit:
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; another iteration starts new ones."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _items(self) -> Iterator[object]:
        if not self.num_workers:
            return map(self.dataset.__getitems__, self.batch_sampler)
        if self._workers is None:
            self._workers = Workers(self.dataset, count=self.num_workers, slot=self._slot, limit=self._timeout)
        return self._workers.map(self.batch_sampler)

    def _pinned(self, items: Iterator[object]) -> Iterator[object]:
        """In page-locked memory, the next one in a thread while the last is worked on."""
        device = torch.cuda.current_device()
        with ThreadPoolExecutor(1, "pin", _init_pinning, (device,)) as thread:
            try:
                following = thread.submit(_next_pinned, items)
                while (item := following.result()) is not None:
                    following = thread.submit(_next_pinned, items)
                    yield item
            except GeneratorExit:
                raise  # the thread ends with the batch that it waits for
            except BaseException:
                if self._workers is not None:
                    self._workers.interrupt()
                raise


def make_loader(
    dataset: D, batches: B, *, workers: int, pin_memory: bool = False, timeout: float = TIMEOUT
) -> ImageLoader[D, B]:
    """A loader over `batches`; `workers` processes live as long as it does, 0 loads in this process.

    `timeout`: seconds that an image may take a worker, 0: any time.
    """
    slot = 0
    if isinstance(dataset, LandmarkDataset):
        assert isinstance(batches, TrainBatches | TestBatches), "batches of unknown size"
        slot = dataset.image_bytes * batches.share
    return ImageLoader(dataset, batches, workers=workers, slot=slot, pin_memory=pin_memory, timeout=timeout)


def _tensors(item: object) -> object:
    if not isinstance(item, ArrayBatch):
        return item
    assert isinstance(item.images, np.ndarray), "a slot outside the workers"
    images, labels, indices, shift = map(torch.from_numpy, (item.images, item.labels, item.indices, item.shift))
    images = images.permute(0, 3, 1, 2) if images.is_floating_point() else images
    return Batch(images, labels, indices, shift, item.broken)


def _init_pinning(device: int) -> None:
    torch.set_num_threads(1)
    torch.cuda.set_device(device)  # a new thread's is the first, where this process has nothing to do


def _next_pinned(items: Iterator[object]) -> object | None:
    item = next(items, None)
    if not isinstance(item, Batch):
        return item
    return item._replace(**{name: getattr(item, name).pin_memory() for name in ("images", "labels", "shift")})
