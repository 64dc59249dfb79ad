"""Descriptors from Python: `load("weights.pyth")(["a.jpg", "b.jpg"])`."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from core.base.errors import UserError
from datasets.images.decode import ImageError, decode
from evaler.extraction.fitting import reduce_to_fit
from evaler.extraction.multiscale import check_lengths, describe_batch
from evaler.network import load_file, without_tf32


class Describer:
    """From photographs to descriptors, as `evaler/infer.py` makes them for images that are not cropped."""

    def __init__(
        self,
        network: nn.Module,
        *,
        scales: Sequence[float],
        max_pixels: int,
        max_level_pixels: int,
        notes: Sequence[str] = (),
    ) -> None:
        """`network` is that of `model.inference.for_inference`; `notes` tell what of a file of weights was loaded."""
        self.notes = tuple(notes)
        self.network, self.scales = network, tuple(scales)
        self.max_pixels, self.max_level_pixels = max_pixels, max_level_pixels

    def __call__(self, images: str | os.PathLike | np.ndarray | Sequence[str | os.PathLike | np.ndarray]) -> np.ndarray:
        """Descriptors float32 [N, D] of length 1; of one image that is not in a list, [D].

        An image is a file's path, or pixels: uint8 [H, W, 3] in the order blue, green, red (as OpenCV reads them).
        Raises `ImageError` naming a file that is missing, truncated or no image, and `UserError` for other pixels and
        for a descriptor that is zero or not finite.
        """
        with without_tf32():
            if isinstance(images, str | os.PathLike | np.ndarray):
                return self._describe(images)
            return np.stack([self._describe(image) for image in images])

    def _describe(self, image: str | os.PathLike | np.ndarray) -> np.ndarray:
        pixels = image if isinstance(image, np.ndarray) else decode(image, max_pixels=self.max_pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
            raise UserError(f"pixels are uint8 [H, W, 3], these are {pixels.dtype} {list(pixels.shape)}")
        pixels = reduce_to_fit(pixels, scales=self.scales, max_pixels=self.max_level_pixels)
        name = "an image" if isinstance(image, np.ndarray) else str(image)
        try:
            vectors = describe_batch(self.network, pixels[None], scales=self.scales, max_pixels=self.max_level_pixels)
        except ValueError as error:
            if isinstance(image, np.ndarray):
                raise
            raise ImageError(f"{image}: {error}") from None
        check_lengths(vectors, [name])
        return vectors[0]


def load(
    weights: str | os.PathLike,
    *,
    scales: Sequence[float] | None = None,
    device: str | None = None,
    precision: str = "fp32",
    compiled: bool = False,
    settings: Sequence[str] = (),
) -> Describer:
    """A describer with the weights of a file or an http(s) address: published ones, or a checkpoint of ours.

    The architecture is what the file's tensors and its own configuration tell, and `notes` of the describer say what
    else there is to know (which of two sets of weights is used); `settings` (KEY VALUE ...) win over them. `device` is
    `cpu` or `cuda` (default: a GPU if there is one). The program's settings of PyTorch (threads, TF32) stay its own.
    Raises `WeightsError` for a file that is none, and `DownloadError`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_file(weights, device, settings)
    infer = loaded.cfg.INFER
    with without_tf32():
        network = loaded.arranged(precision=precision, compiled=compiled)
    return Describer(
        network,
        scales=scales or infer.SCALES,
        max_pixels=infer.MAX_PIXELS,
        max_level_pixels=infer.MAX_LEVEL_PIXELS,
        notes=loaded.notes,
    )
