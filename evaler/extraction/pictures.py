"""Pictures in the order of a list, decoded ahead of the network and put together by size."""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from datasets.images.decode import ImageError
from datasets.loader import TIMEOUT, make_loader
from evaler.extraction.decoder import Broken, Decoder, Encoded, Limits, Picture
from evaler.extraction.fitting import fits
from evaler.extraction.gpu_jpeg import GpuDecoder, upright_bgr
from evaler.sources.image_list import ImageList, crop

__all__ = ["Broken", "Encoded", "Limits", "Picture", "Pictures", "by_size", "decoded"]

# Decoded pictures that wait for others of their size.
MOST_WAITING_BYTES = 2**28


class Pictures:
    """The images of a list within the limits. Loader workers make them, by `decoder`; the rest is done by `finished`.

    With `on_gpu` JPEGs are decoded by it, in the main process.
    """

    def __init__(self, images: ImageList, limits: Limits, *, on_gpu: GpuDecoder | None = None) -> None:
        self.images, self.limits, self.on_gpu = images, limits, on_gpu
        self.decoder = Decoder(images, limits, leave_jpegs=on_gpu is not None)

    def picture(self, index: int) -> Picture:
        """Image i, decoded here and now. Raises `ImageError` if it cannot be described."""
        item = self.finished(self.decoder[index])
        if isinstance(item, Broken):
            raise ImageError(f"{self.images.source(index)}: {item.reason}")
        return item

    def finished(self, item: Picture | Broken | Encoded) -> Picture | Broken:
        """The `Picture`, with a tensor, or `Broken` of what the decoder made."""
        if isinstance(item, Encoded):
            item = self._decoded_on_gpu(item)
        if isinstance(item, Picture) and not isinstance(item.pixels, Tensor):
            return replace(item, pixels=torch.from_numpy(item.pixels))
        return item

    def _decoded_on_gpu(self, item: Encoded) -> Picture | Broken:
        assert self.on_gpu is not None
        try:
            stored = self.on_gpu(torch.from_numpy(item.data))
        except torch.OutOfMemoryError:  # which decoder makes the pixels must not depend on it
            raise
        except RuntimeError:  # nvJPEG does not know every kind: libjpeg decodes this one, or says what is wrong
            return self.decoder.decoded(item.index)
        image = crop(upright_bgr(stored, item.orientation), self.images.box(item.index))
        return replace(self._checked(item.index, image), sha256=item.sha256)

    def _checked(self, index: int, image: Tensor) -> Picture | Broken:
        if 0 in image.shape:
            return Broken(index, f"the query's box {self.images.box(index)} lies outside the picture")
        height, width = image.shape[:2]
        try:
            self.limits.check(width, height)
        except ValueError as error:
            return Broken(index, str(error))
        if fits(width, height, scales=self.limits.scales, max_pixels=self.limits.max_level_pixels):
            return Picture(index, image, (width, height))
        return self.decoder.reduced(index, image.cpu().numpy())


class _Singly:
    """Batches of one."""

    def __init__(self, indices: Iterable[int]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return ([index] for index in self._indices)


def decoded(
    pictures: Pictures, indices: Iterable[int], *, workers: int, timeout: float = TIMEOUT
) -> Generator[Picture | Broken, None, None]:
    """The pictures of these indices, in their order, decoded by `workers` processes ahead of their use.

    To be closed if it is not read to its end (`contextlib.closing`). `timeout`: as in `make_loader`.
    """
    loader = make_loader(pictures.decoder, _Singly(indices), workers=workers, timeout=timeout)
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
