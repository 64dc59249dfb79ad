"""Batches on the device, normalised: what a training step gets."""

import functools
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from datasets.loader import Batch, ImageLoader
from datasets.transforms import MEAN_BGR, SD_BGR


def normalise_on_device(images: Tensor, shift: Tensor, *, out: Tensor | None = None) -> Tensor:
    """uint8 [B, H, W, 3] BGR, float32 [B, 3] -> float32 [B, 3, H, W] in channels_last order, made in `out` if given.

    (x/255 + shift - mean) / sd in one pass over float32: within 2e-6 of `transforms.normalise`. `out` is
    float32 [B, H, W, 3], contiguous.
    """
    batch, height, width, _ = images.shape
    mean, sd = _statistics(shift.device)
    # Constants a row long: with one pixel's, the inner loop on the CPU would be 3 long.
    scale, offset = (1 / (255 * sd)).repeat(width), ((shift - mean) / sd).repeat(1, width)[:, None]
    if out is None:
        out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    source, target = images.flatten(2), out.flatten(2)
    # On the CPU some rows at a time: they stay in the cache, and are too few for PyTorch to share among threads, which
    # the loader's workers would keep waiting.
    step = height if images.is_cuda else max(1, 32768 // (3 * width))
    for part in (...,) if images.is_cuda else range(batch):
        for y in range(0, height, step):
            rows = ..., slice(y, y + step), slice(None)
            pixels = target[part][rows].copy_(source[part][rows])
            torch.addcmul(offset[part], pixels, scale, out=pixels)
    return out.permute(0, 3, 1, 2)


@functools.cache  # copying them to a GPU anew would make the host wait
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(MEAN_BGR).to(device), torch.from_numpy(SD_BGR).to(device)


@functools.cache  # its memory is not given to another stream: a new one for each epoch would take as much again
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The one stream of this process that copies batches to a device."""
    return torch.cuda.Stream(device)


class DeviceBatches:
    """Iterates a loader; yields its batches with images (float32 [B, 3, S, S], channels_last) and labels on `device`.

    On a GPU the next batch is copied and normalised on a stream of its own while the current one is worked on, and the
    host waits for nothing; that needs a loader with `pin_memory`. `indices`, `shift` and `broken` stay on the CPU.
    """

    def __init__(self, loader: ImageLoader, device: torch.device | str) -> None:
        self.loader, self.device = loader, torch.device(device)
        self._lent: list[tuple[np.ndarray, weakref.ref]] = []  # on the CPU: memory of batches

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type == "cuda":
            return self._ahead()
        return (self._moved(batch) for batch in self.loader)

    def _ahead(self) -> Iterator[Batch]:
        copies, current = _copies(self.device), None
        for batch in self.loader:
            with torch.cuda.stream(copies):
                following = self._moved(batch)
                ready = copies.record_event()
            if current is not None:
                yield self._received(*current)
            current = following, ready
        if current is not None:
            yield self._received(*current)

    def _received(self, batch: Batch, ready: torch.cuda.Event) -> Batch:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(ready)
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(stream)  # else its memory would be given to the next copy while it is still read
        return batch

    def _moved(self, batch: Batch) -> Batch:
        images = batch.images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            out = self._memory(images.shape) if self.device.type == "cpu" else None
            images = normalise_on_device(images, batch.shift.to(self.device, non_blocking=True), out=out)
        images = images.contiguous(memory_format=torch.channels_last)
        return batch._replace(images=images, labels=batch.labels.to(self.device, non_blocking=True))

    def _memory(self, shape: torch.Size) -> Tensor:
        # New memory costs more time than the normalisation (`batch_memory` says why). The tensor and its views hold
        # `lent`; when they are gone, the array behind it is free again.
        free = [array for array, lent in self._lent if lent() is None and array.shape == shape]
        array = free[0] if free else np.empty(shape, np.float32)
        lent = array[:]
        self._lent = [pair for pair in self._lent if pair[1]() is not None] + [(array, weakref.ref(lent))]
        return torch.from_numpy(lent)
