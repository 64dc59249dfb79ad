"""From decoded pixels to the network's input: the published arithmetic, in its order, in float32.

Training: crop, bilinear resize, flip, /255, PCA lighting, normalise. Test: resize, centre crop, /255, normalise.
Extraction: resize by a scale, /255, normalise. Resizing is done on float32 in 0..255: resizing uint8 would round, and
moves a descriptor by 4e-5 and more.

`FastTrainTransform` is the other way: the same crop and flip on uint8, the rest on the device (`device.py`).

Every function is pure: what is random in training is drawn beforehand by `draw_train` and handed in.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from datasets.errors import DataError
from datasets.images.decode import ImageFile
from datasets.resize_part import resize_part

# ImageNet statistics of pixels in 0..1, blue, green, red.
MEAN_BGR = np.array([0.406, 0.456, 0.485], np.float32)
SD_BGR = np.array([0.225, 0.224, 0.229], np.float32)

# Principal components of ImageNet's colours (AlexNet, section 4.1): a column a component, rows red, green, blue.
LIGHTING_SD = 0.1
LIGHTING_VALUES = np.array([0.2175, 0.0188, 0.0045])
LIGHTING_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])

CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10

# Of an image before and after resizing together (400 MB in float32). Above, only what the crop needs is resized.
_MOST_WHOLE_PIXELS = 2**25
_MOST_WARPED_SIDE = 2**15 - 1  # OpenCV's, before version 5

Box = tuple[float, float, float, float]  # y, x, height, width in pixels


@dataclass(frozen=True)
class TrainDraw:
    """What is random about one training sample."""

    box: tuple[int, int, int, int] | None  # y, x, height, width in pixels; None: scale the shorter side, centre crop
    flip: bool
    alpha: tuple[float, float, float]  # weights of the three lighting components


def draw_train(rng: np.random.Generator, height: int, width: int) -> TrainDraw:
    """Draw crop, flip and lighting for an image of this size, distributed as in the published code.

    A crop's area is uniform in 0.08..1 of the image, its aspect uniform in 3/4..4/3 and turned over with probability
    1/2; up to ten tries until it fits. As published, its corner never takes the last position that would fit.
    """
    box = _draw_box(rng, height, width)
    flip = bool(rng.random() < 0.5)
    return TrainDraw(box, flip, tuple(rng.normal(0.0, LIGHTING_SD, 3).tolist()))


def _draw_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int] | None:
    for _ in range(CROP_TRIES):
        area = rng.uniform(*CROP_AREA) * (height * width)
        aspect = rng.uniform(*CROP_ASPECT)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rng.random() < 0.5:
            w, h = h, w
        if 1 <= h <= height and 1 <= w <= width:  # 0 is possible in images of a few pixels only
            y = 0 if h == height else int(rng.integers(0, height - h))
            x = 0 if w == width else int(rng.integers(0, width - w))
            return y, x, h, w
    return None


def transform_train(image: np.ndarray, draw: TrainDraw, size: int) -> np.ndarray:
    """uint8 [H, W, 3] BGR -> float32 [3, size, size], with the given draw."""
    return normalise(_cut_train(image, draw, size), shift=lighting_shift(draw.alpha))


def transform_test(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    """uint8 [H, W, 3] BGR -> float32 [3, size, size]: shorter side to `resize`, then the centre `size` x `size`."""
    return normalise(_cut_test(image, resize, size))


@dataclass(frozen=True)
class TrainTransform:
    """What the loader calls for a training sample: `transform_train`."""

    size: int
    dtype = np.float32  # of `out`

    def write(self, file: ImageFile, rng: np.random.Generator, out: np.ndarray) -> np.ndarray:
        """Write the input to `out`, float32 [size, size, 3]; return zeros [3]. Raises ImageError."""
        image = file.decode()
        draw = draw_train(rng, *image.shape[:2])
        normalise_into(out, _cut_train(image, draw, self.size), shift=lighting_shift(draw.alpha))
        return np.zeros(3, np.float32)


@dataclass(frozen=True)
class TestTransform:
    """The same for validation: `transform_test`, without chance. There is no fast variant: it is the smaller part."""

    resize: int
    size: int
    dtype = np.float32

    def write(self, file: ImageFile, rng: np.random.Generator, out: np.ndarray) -> np.ndarray:
        normalise_into(out, _cut_test(file.decode(), self.resize, self.size))
        return np.zeros(3, np.float32)


@dataclass(frozen=True)
class FastTrainTransform:
    """The draw of `TrainTransform`, but crop, resize and flip are done on uint8; lighting and normalisation are left.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves at least `size` pixels of the crop both ways.

    What this changes in the input, in units of 1/255, over 1,800 crops of photographs to 64 .. 512 px: 0.25 in the
    mean and at most 0.8, the rounding. Where the decode is reduced 4 to 5 in the mean (13 in the worst photograph) and
    up to 124 at edges: blocks are averaged, while bilinear resizing skips pixels.
    """

    size: int
    dtype = np.uint8

    def write(self, file: ImageFile, rng: np.random.Generator, out: np.ndarray) -> np.ndarray:
        """Write the crop to `out`, uint8 [size, size, 3]; return its lighting, float32 [3]. Raises ImageError."""
        whole, start = file.size, rng.bit_generator.state
        if whole is not None:
            draw = draw_train(rng, *whole)
            box = _box(draw, *whole, self.size)
            fitting = (f for f in file.reductions if f * self.size <= min(box[2:]))
            reduction = max(fitting, default=1)
            end = min(whole[0], math.ceil(box[0] + box[2]) + 1)
            image = file.decode(reduction) if reduction > 1 else file.decode_rows(end)
            if image.shape[1] == -(-whole[1] // reduction) and len(image) >= end // reduction:
                cut_fast(out, image, draw, box=box, reduction=reduction)
                return lighting_shift(draw.alpha).astype(np.float32)
            rng.bit_generator.state = start  # OpenCV finds another size than the header tells: it decides
        image = file.decode()
        draw = draw_train(rng, *image.shape[:2])
        cut_fast(out, image, draw, box=_box(draw, image.shape[0], image.shape[1], self.size))
        return lighting_shift(draw.alpha).astype(np.float32)


def cut_fast(out: np.ndarray, image: np.ndarray, draw: TrainDraw, *, box: Box, reduction: int = 1) -> None:
    """Write the crop of uint8 [H, W, 3], resized and flipped, to `out`, uint8 [S, S, 3].

    `box` is given in pixels of the whole image, of which `image` is the decode at 1/`reduction` of the size.
    """
    size = len(out)
    y, x, h, w = box
    if reduction == 1 and draw.box is not None:
        crop = image[y : y + h, x : x + w]
        if draw.flip:
            cv2.flip(cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR), 1, dst=out)
        else:
            cv2.resize(crop, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
        return
    # The corners lie between pixels. Matrix from a pixel of `out` to its place in `image`, both counted at the centre.
    down, right = h / size / reduction, w / size / reduction
    top, left = y / reduction + down / 2 - 0.5, x / reduction + right / 2 - 0.5
    if draw.flip:
        left, right = left + right * (size - 1), -right
    matrix = np.array([[right, 0, left], [0, down, top]])
    if max(image.shape) > _MOST_WARPED_SIDE:
        y, x = max(0, int(top) - 2), max(0, int(min(left, left + right * (size - 1))) - 2)
        image = image[y : y + math.ceil(down * size) + 5, x : x + math.ceil(abs(right) * size) + 5]
        matrix[:, 2] -= x, y
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(image, matrix, (size, size), dst=out, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Width and height in pixels at a scale, rounded half to even. Raises DataError if a side becomes 0."""
    scaled = round(width * scale), round(height * scale)
    if min(scaled) < 1:
        raise DataError(f"an image of {width} x {height} pixels has nothing left at scale {scale}")
    return scaled


def preprocess(image: np.ndarray, scale: float) -> np.ndarray:
    """uint8 [H, W, 3] BGR -> float32 [3, h, w], the network's input at one scale of the extraction pyramid."""
    height, width = image.shape[:2]
    return normalise(resize_bilinear(image.astype(np.float32), *scaled_size(width, height, scale)))


def resize_bilinear(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """float32 [H, W, 3] -> float32 [height, width, 3], bilinear without antialiasing, the same at any thread count."""
    assert image.dtype == np.float32, image.dtype
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def normalise(image: np.ndarray, *, shift: np.ndarray | None = None) -> np.ndarray:
    """float32 [H, W, 3] BGR in 0..255 -> float32 [3, H, W], contiguous: (x/255 + shift - mean) / sd."""
    out = np.empty(image.shape, np.float32)
    normalise_into(out, image, shift=shift)
    return np.ascontiguousarray(out.transpose(2, 0, 1))


def normalise_into(out: np.ndarray, image: np.ndarray, *, shift: np.ndarray | None = None) -> None:
    """Write (x/255 + shift - mean) / sd of float32 [H, W, 3] BGR in 0..255 to `out`, of the same shape, contiguous.

    The shift (float64 [3], BGR) is added in float64 and rounded once, as the published code does under NumPy 2.
    """
    assert image.dtype == out.dtype == np.float32, (image.dtype, out.dtype)
    source, target = np.ascontiguousarray(image).reshape(-1), out.reshape(-1)
    # A block at a time, which stays in the cache; as many constants, since NumPy is slow at rows of 3.
    pixels = min(8192, len(target) // 3)
    block, mean, sd = 3 * pixels, np.tile(MEAN_BGR, pixels), np.tile(SD_BGR, pixels)
    if shift is not None:
        shift, sums = np.tile(shift, pixels), np.empty(block)
    for first in range(0, len(target), block):
        part = target[first : first + block]
        n = len(part)
        np.divide(source[first : first + n], 255, out=part)
        if shift is not None:
            sums[:n] = part
            sums[:n] += shift[:n]
            part[:] = sums[:n]
        part -= mean[:n]
        part /= sd[:n]


def lighting_shift(alpha: tuple[float, float, float]) -> np.ndarray:
    """float64 [3]: what PCA lighting adds to blue, green and red of pixels in 0..1."""
    rgb = (LIGHTING_VECTORS * np.asarray(alpha, np.float64) * LIGHTING_VALUES).sum(axis=1)
    return rgb[::-1]


def _cut_train(image: np.ndarray, draw: TrainDraw, size: int) -> np.ndarray:
    """float32 [size, size, 3]: cropped, resized, flipped."""
    if draw.box is None:
        crop = _scaled_centre(image, size, size)
    else:
        y, x, h, w = draw.box
        crop = _resized(image[y : y + h, x : x + w], size, size, (0, 0, size, size))
    return cv2.flip(crop, 1) if draw.flip else crop


def _cut_test(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    assert resize >= size, f"a centre crop of {size} needs a shorter side of at least that, not {resize}"
    return _scaled_centre(image, resize, size)


def _scaled_centre(image: np.ndarray, shorter: int, size: int) -> np.ndarray:
    """float32 [size, size, 3]: the centre of the image with its shorter side at `shorter`."""
    height, width = _scaled_shorter(image.shape[0], image.shape[1], shorter)
    part = math.ceil((height - size) / 2), math.ceil((width - size) / 2), size, size
    return _resized(image, height, width, part)


def _resized(image: np.ndarray, height: int, width: int, part: tuple[int, int, int, int]) -> np.ndarray:
    """float32 [h, w, 3], the part y, x, h, w of uint8 [H, W, 3] resized to `height` x `width`."""
    if image.shape[0] * image.shape[1] + height * width > _MOST_WHOLE_PIXELS:
        return resize_part(image, height, width, part)
    y, x, h, w = part
    whole = image.astype(np.float32)
    if whole.shape[:2] != (height, width):
        whole = resize_bilinear(whole, width, height)
    return whole[y : y + h, x : x + w]


def _box(draw: TrainDraw, height: int, width: int, size: int) -> Box:
    """The crop in pixels of the image, also where it is the centre of the scaled image; corners between pixels then."""
    if draw.box is not None:
        return draw.box
    h, w = _scaled_shorter(height, width, size)
    y, x = math.ceil((h - size) / 2), math.ceil((w - size) / 2)
    return y * height / h, x * width / w, size * height / h, size * width / w


def _scaled_shorter(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shorter side at `size`, the longer floored; an image already there is left as it is."""
    if min(height, width) == size:
        return height, width
    return (math.floor(height / width * size), size) if width < height else (size, math.floor(width / height * size))
