"""A part of a resized image, without the rest: a photograph of 1 x 60,000 pixels would become 36 GB.

The values are those of `cv2.resize` (INTER_LINEAR on float32) of the whole, cut: places in float64, weights in float32,
rows before columns, each interpolation rounded once. Within a rounding: OpenCV 5.0 on x86-64 with AVX2 gives the same
bits in images of 3 pixels or more either way. In those of one column or row OpenCV has places in float32, which moves
the value of a pixel by up to 0.004 (of 255) at 2,000 rows.
"""

import numpy as np


def resize_part(image: np.ndarray, height: int, width: int, part: tuple[int, int, int, int]) -> np.ndarray:
    """`resized[y : y + h, x : x + w]` as float32 [h, w, 3] of uint8 [H, W, 3] resized to `height` x `width`.

    `part` is y, x, h, w. Takes memory for the part alone.
    """
    y, x, h, w = part
    above, below, down = _neighbours(image.shape[0], height, y, h)
    left, right, across = _neighbours(image.shape[1], width, x, w)
    across, down = across[:, None], down[:, None, None]
    upper, lower = (
        _between(image[rows[:, None], left], image[rows[:, None], right], across) for rows in (above, below)
    )
    return _between(upper, lower, down)


def _neighbours(length: int, resized: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `count` pixels of the resized axis the pixels before and behind, and how near the one behind is (0..1)."""
    places = np.clip((np.arange(first, first + count) + 0.5) * (length / resized) - 0.5, 0, length - 1)
    before = np.floor(places).astype(np.int64)
    return before, np.minimum(before + 1, length - 1), (places - before).astype(np.float32)


def _between(one: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """one + (other - one) * weight in float32, the product not rounded."""
    one, other = one.astype(np.float32), other.astype(np.float32)
    return (one + (other - one).astype(np.float64) * weight).astype(np.float32)
