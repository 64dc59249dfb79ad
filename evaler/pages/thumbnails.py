"""Small pictures for a page."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from core.base.progress import bar
from datasets.images.decode import ImageError
from evaler.sources.image_list import ImageList
from evaler.sources.images import read_cropped

QUALITY = 78  # of JPEG
THREADS = 4
OPACITY = 0.85  # of the strongest attention


def thumbnails(
    wanted: Iterable[tuple[ImageList, int]], *, size: tuple[int, int], max_pixels: int, title: str
) -> list[bytes | ImageError]:
    """JPEGs of images, queries cut to their box, within `size` (width, height); the error where one cannot be read."""

    def make(one: tuple[ImageList, int]) -> bytes | ImageError:
        try:
            return encode(reduced(read_cropped(*one, max_pixels=max_pixels), size), ".jpg")
        except ImageError as error:
            return error

    wanted = list(wanted)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(bar(pool.map(make, wanted), title, unit="image", total=len(wanted), delay=1))


def reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] made smaller, so that it is within width and height `size`; never larger."""
    height, width = image.shape[:2]
    factor = min(size[0] / width, size[1] / height)
    if factor >= 1:
        return image
    to = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(image, to, interpolation=cv2.INTER_AREA)


def heat(attention: np.ndarray) -> bytes:
    """An attention map [h, w] as a PNG with alpha, a pixel for a position, to be laid over the picture.

    The weakest position is transparent, the strongest is yellow.
    """
    low, high = float(attention.min()), float(attention.max())
    level = ((attention - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    colours = cv2.applyColorMap(level, cv2.COLORMAP_INFERNO)
    return encode(np.dstack([colours, (level * OPACITY).astype(np.uint8)]), ".png")


def encode(image: np.ndarray, kind: str) -> bytes:
    """uint8 [H, W, 3 or 4] BGR(A) -> the bytes of a file."""
    done, data = cv2.imencode(kind, image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY] if kind == ".jpg" else [])
    assert done, image.shape
    return data.tobytes()
