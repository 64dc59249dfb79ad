"""What loader workers make of the images of a list. PyTorch is not needed, and not imported there."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from core.base.errors import UserError
from datasets.batch_memory import WorkerMemory
from datasets.images.decode import ImageError, ImageFile
from datasets.transforms import scaled_size
from evaler.extraction.fitting import reduce_to_fit
from evaler.sources.image_list import ImageList, read_cropped

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """Which pictures are described, and at which size (`INFER`'s keys of these names)."""

    scales: tuple[float, ...]
    min_side: int
    max_aspect: float
    max_pixels: int
    max_level_pixels: int

    def check(self, width: int, height: int) -> None:
        """Raise `UserError` for a picture that is not described."""
        short, long = sorted((width, height))
        if short < self.min_side:
            raise UserError(f"{width} x {height} pixels, its shorter side is below INFER.MIN_SIDE {self.min_side}")
        if long > self.max_aspect * short:
            raise UserError(f"{width} x {height} pixels, longer than INFER.MAX_ASPECT {self.max_aspect:g} to 1")
        for scale in self.scales:
            scaled_size(width, height, scale)

    def batch(self, width: int, height: int, size: int) -> int:
        """How many pictures of this size, `size` at most, have their largest levels within the limit together."""
        level = np.multiply(*scaled_size(width, height, max(self.scales)))
        return max(1, min(size, int(self.max_level_pixels // level)))


@dataclass(frozen=True)
class Picture:
    """A decoded image of a list. `pixels`: uint8 [H, W, 3] BGR, within the limits; `size`: width and height before.

    A worker makes an array; in the main process it becomes a tensor, on the GPU if it has been decoded there.
    """

    index: int
    pixels: "np.ndarray | Tensor"
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
    data: np.ndarray
    orientation: int  # EXIF's
    sha256: bytes = b""


Item = Picture | Broken | Encoded
T = TypeVar("T", Picture | Broken, Item)


class Decoder:
    """Item i is the `Picture` of image i of the list, or `Broken`; with `leave_jpegs` it may be `Encoded`."""

    def __init__(self, images: ImageList, limits: Limits, *, leave_jpegs: bool) -> None:
        self.images, self.limits, self.leave_jpegs = images, limits, leave_jpegs
        self.worker: WorkerMemory | None = None  # that of the worker which this is in

    def source(self, index: int) -> str:
        """What messages call an image."""
        return self.images.source(index)

    def __getitems__(self, indices: list[int]) -> Item:
        """The loader's batches are of one."""
        (index,) = indices
        return self[index]

    def __getitem__(self, index: int) -> Item:
        if self.worker:
            self.worker.begin(index)
        return self._hashed(index, self._encoded_or_decoded)

    def decoded(self, index: int) -> Picture | Broken:
        """The image, decoded here."""
        return self._hashed(index, self._decoded)

    def _hashed(self, index: int, make: Callable[[int, bytes], T]) -> T:
        try:
            data = self.images.read(index)
        except ImageError as error:
            return self._broken(index, error)
        return replace(make(index, data), sha256=hashlib.sha256(data).digest())

    def _encoded_or_decoded(self, index: int, data: bytes) -> Item:
        if self.leave_jpegs:
            try:
                file = ImageFile(self.images.source(index), data, max_pixels=self.limits.max_pixels)
            except ImageError as error:
                return self._broken(index, error)
            if file.orientation is not None:
                return Encoded(index, np.frombuffer(bytearray(data), np.uint8), file.orientation)
        return self._decoded(index, data)

    def _decoded(self, index: int, data: bytes) -> Picture | Broken:
        try:
            image = read_cropped(self.images, index, max_pixels=self.limits.max_pixels, data=data)
        except ImageError as error:
            return self._broken(index, error)
        height, width = image.shape[:2]
        try:
            self.limits.check(width, height)
        except ValueError as error:
            return Broken(index, str(error))
        return self.reduced(index, image)

    def reduced(self, index: int, image: np.ndarray) -> Picture:
        """Of uint8 [H, W, 3], made smaller if the limits say so."""
        height, width = image.shape[:2]
        within = reduce_to_fit(image, scales=self.limits.scales, max_pixels=self.limits.max_level_pixels)
        return Picture(index, np.ascontiguousarray(within), (width, height))

    def _broken(self, index: int, error: ImageError) -> Broken:
        return Broken(index, str(error).removeprefix(f"{self.images.source(index)}: "))
