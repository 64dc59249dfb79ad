"""Pictures in the order of a list, decoded ahead of the network and put together by size."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.image import ImageError, ImageFile
from datasets.loader import make_loader
from datasets.transforms import scaled_size
from evaler.gpu_jpeg import GpuDecoder, upright_bgr
from evaler.images import ImageList, crop, read_cropped
from evaler.multiscale import fits, reduce_to_fit

# Decoded pictures that wait for others of their size.
MOST_WAITING_BYTES = 2**28


@dataclass(frozen=True)
class Limits:
    """Which pictures are described, and at which size (`INFER`'s keys of these names)."""

    scales: tuple[float, ...]
    min_side: int
    max_aspect: float
    max_pixels: int
    max_level_pixels: int

    def check(self, width: int, height: int) -> None:
        """Raise `ValueError` for a picture that is not described."""
        short, long = sorted((width, height))
        if short < self.min_side:
            raise ValueError(f"{width} x {height} pixels, its shorter side is below INFER.MIN_SIDE {self.min_side}")
        if long > self.max_aspect * short:
            raise ValueError(f"{width} x {height} pixels, longer than INFER.MAX_ASPECT {self.max_aspect:g} to 1")
        for scale in self.scales:
            scaled_size(width, height, scale)

    def batch(self, width: int, height: int, size: int) -> int:
        """How many pictures of this size, `size` at most, have their largest levels within the limit together."""
        level = np.multiply(*scaled_size(width, height, max(self.scales)))
        return max(1, min(size, int(self.max_level_pixels // level)))


@dataclass(frozen=True)
class Picture:
    """A decoded image of a list. `pixels`: uint8 [H, W, 3] BGR, within the limits; `size`: width and height before.

    The pixels are in CPU memory, or on the GPU if they have been decoded there.
    """

    index: int
    pixels: Tensor
    size: tuple[int, int]
    sha256: bytes = b""  # of the file, as read; empty if it cannot be


@dataclass(frozen=True)
class Broken:
    """An image that cannot be described, and why."""

    index: int
    reason: str
    sha256: bytes = b""


@dataclass(frozen=True)
class Encoded:
    """A JPEG whose header is in order, to be decoded on the GPU. `data`: uint8 [bytes]."""

    index: int
    data: Tensor
    orientation: int  # EXIF's
    sha256: bytes = b""


_Item = Picture | Broken | Encoded


class Pictures(Dataset):
    """Item i is the `Picture` of image i of the list, or `Broken`; with `on_gpu` it may be `Encoded`.

    Loader workers make the items; `finished` is called in the main process, where the GPU is.
    """

    def __init__(self, images: ImageList, limits: Limits, *, on_gpu: GpuDecoder | None = None) -> None:
        self.images, self.limits, self.on_gpu = images, limits, on_gpu

    def __getitem__(self, index: int) -> Picture | Broken | Encoded:
        return self._hashed(index, self._encoded_or_decoded)

    def _hashed(self, index: int, make: Callable[[int, bytes], _Item]) -> _Item:
        try:
            data = self.images.read(index)
        except ImageError as error:
            return self._broken(index, error)
        return replace(make(index, data), sha256=hashlib.sha256(data).digest())

    def _encoded_or_decoded(self, index: int, data: bytes) -> _Item:
        if self.on_gpu is not None:
            try:
                file = ImageFile(self.images.source(index), data, max_pixels=self.limits.max_pixels)
            except ImageError as error:
                return self._broken(index, error)
            if file.orientation is not None:
                return Encoded(index, torch.frombuffer(bytearray(data), dtype=torch.uint8), file.orientation)
        return self._decoded_here(index, data)

    def picture(self, index: int) -> Picture:
        """Image i, decoded here and now. Raises `ImageError` if it cannot be described."""
        item = self.finished(self[index])
        if isinstance(item, Broken):
            raise ImageError(f"{self.images.source(index)}: {item.reason}")
        return item

    def _decoded_here(self, index: int, data: bytes) -> Picture | Broken:
        try:
            image = read_cropped(self.images, index, max_pixels=self.limits.max_pixels, data=data)
        except ImageError as error:
            return self._broken(index, error)
        return self._picture(index, image)

    def _broken(self, index: int, error: ImageError) -> Broken:
        return Broken(index, str(error).removeprefix(f"{self.images.source(index)}: "))

    def finished(self, item: Picture | Broken | Encoded) -> Picture | Broken:
        """The item itself, or, if it is `Encoded`, the `Picture` (on the GPU) or `Broken` of it."""
        if not isinstance(item, Encoded):
            return item
        assert self.on_gpu is not None
        try:
            stored = self.on_gpu(item.data)
        except torch.OutOfMemoryError:  # which decoder makes the pixels must not depend on it
            raise
        except RuntimeError:  # nvJPEG does not know every kind: libjpeg decodes this one, or says what is wrong
            return self._hashed(item.index, self._decoded_here)
        image = crop(upright_bgr(stored, item.orientation), self.images.box(item.index))
        if 0 in image.shape:
            return Broken(
                item.index, f"the query's box {self.images.box(item.index)} lies outside the picture", item.sha256
            )
        return replace(self._picture(item.index, image), sha256=item.sha256)

    def _picture(self, index: int, image: np.ndarray | Tensor) -> Picture | Broken:
        height, width = image.shape[:2]
        try:
            self.limits.check(width, height)
        except ValueError as error:
            return Broken(index, str(error))
        limits = {"scales": self.limits.scales, "max_pixels": self.limits.max_level_pixels}
        if isinstance(image, Tensor):
            if fits(width, height, **limits):
                return Picture(index, image, (width, height))
            image = image.cpu().numpy()
        image = np.ascontiguousarray(reduce_to_fit(image, **limits))
        return Picture(index, torch.from_numpy(image), (width, height))

    def __getitems__(self, indices: list[int]) -> Picture | Broken | Encoded:
        """The loader's batches are of one."""
        (index,) = indices
        return self[index]


class _Singly:
    """Batches of one."""

    def __init__(self, indices: Iterable[int]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return ([index] for index in self._indices)


def decoded(pictures: Pictures, indices: Iterable[int], *, workers: int) -> Iterator[Picture | Broken]:
    """The pictures of these indices, in their order, decoded by `workers` processes ahead of their use.

    To be closed if it is not read to its end (`contextlib.closing`).
    """
    loader = make_loader(pictures, _Singly(indices), workers=workers, pin_memory=False)
    try:
        yield from map(pictures.finished, loader)
    finally:
        loader.close()


def by_size(pictures: Iterable[Picture], limits: Limits, *, batch_size: int) -> Iterator[list[Picture]]:
    """Put pictures of one size together, `batch_size` at most; which ones depends on their order and sizes only.

    Pictures that wait for company hold no more than `MOST_WAITING_BYTES`: those that wait longest go first.
    """
    waiting: dict[tuple, list[Picture]] = {}
    held = 0
    for picture in pictures:
        shape = (*picture.pixels.shape, picture.pixels.device)
        group = waiting.setdefault(shape, [])
        group.append(picture)
        held += picture.pixels.nbytes
        if len(group) == limits.batch(shape[1], shape[0], batch_size):
            yield waiting.pop(shape)
            held -= sum(member.pixels.nbytes for member in group)
        while held > MOST_WAITING_BYTES:
            oldest = waiting.pop(next(iter(waiting)))
            held -= sum(member.pixels.nbytes for member in oldest)
            yield oldest
    yield from waiting.values()
