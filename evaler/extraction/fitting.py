"""Pictures whose largest level would not fit the memory, made smaller."""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from datasets.transforms import scaled_size

# Of the largest level of an image: 16.8 million pixels of photograph at scale 1.4142.
MAX_LEVEL_PIXELS = 2**25


def reduce_to_fit(image: np.ndarray, *, scales: Sequence[float], max_pixels: int = MAX_LEVEL_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3] -> the same image, or, if its largest level has more than `max_pixels`, a smaller one that fits.

    It is averaged over areas, aspect kept. A ResNet-101 with multi-atrous holds 176 bytes for a pixel of the largest
    level at fp32 (106 at bf16; peak memory on a CPU), 6 GB at the default: room for cuDNN on a GPU of 16 GB. Reduced
    pictures have other descriptors: 1 - cosine of 1e-3 to 2e-3 at 12 million pixels, at 48 million 1e-3 to 8e-2, the
    more the softer they are (three pictures, a ResNet-18 trained for minutes, against the whole size).
    """
    height, width = image.shape[:2]
    if fits(width, height, scales=scales, max_pixels=max_pixels):
        return image
    factor = math.sqrt(max_pixels / (width * height)) / max(scales)
    long, short = max(width, height), min(width, height)
    size = math.ceil(long * factor)
    while size > 1 and math.prod(scaled_size(size, _shorter(size, long, short), max(scales))) > max_pixels:
        size -= 1  # at most a few times: what rounding adds
    other = _shorter(size, long, short)
    return cv2.resize(image, (size, other) if width >= height else (other, size), interpolation=cv2.INTER_AREA)


def _shorter(size: int, long: int, short: int) -> int:
    """The shorter side where the longer has `size` pixels."""
    return max(1, round(short * size / long))


def fits(width: int, height: int, *, scales: Sequence[float], max_pixels: int = MAX_LEVEL_PIXELS) -> bool:
    """Whether the largest level of an image has no more than `max_pixels`."""
    return math.prod(scaled_size(width, height, max(scales))) <= max_pixels
