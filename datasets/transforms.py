"""From decoded pixels to the network's input: the published arithmetic, in its order, in float32.

Training: crop, bilinear resize, flip, /255, PCA lighting, normalise. Test: resize, centre crop, /255, normalise.
Extraction: resize by a scale, /255, normalise. Resizing is done on float32 in 0..255: resizing uint8 would round, and
moves a descriptor by 4e-5 and more.

Every function is pure: what is random in training is drawn beforehand by `draw_train` and handed in.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

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
    if draw.box is None:
        crop = _centre_crop(_resize_shorter(image.astype(np.float32), size), size)
    else:
        y, x, h, w = draw.box
        crop = resize_bilinear(image[y : y + h, x : x + w].astype(np.float32), size, size)
    if draw.flip:
        crop = crop[:, ::-1]
    return normalise(crop, shift=lighting_shift(draw.alpha))


def transform_test(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    """uint8 [H, W, 3] BGR -> float32 [3, size, size]: shorter side to `resize`, then the centre `size` x `size`."""
    assert resize >= size, f"a centre crop of {size} needs a shorter side of at least that, not {resize}"
    return normalise(_centre_crop(_resize_shorter(image.astype(np.float32), resize), size))


@dataclass(frozen=True)
class TrainTransform:
    """Draw and apply: (uint8 [H, W, 3] BGR, rng) -> float32 [3, size, size]."""

    size: int

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return transform_train(image, draw_train(rng, *image.shape[:2]), self.size)


@dataclass(frozen=True)
class TestTransform:
    """The same call without chance: `rng` is not touched."""

    resize: int
    size: int

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return transform_test(image, self.resize, self.size)


def scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Width and height in pixels at a scale, rounded half to even. Raises ValueError if a side becomes 0."""
    scaled = round(width * scale), round(height * scale)
    if min(scaled) < 1:
        raise ValueError(f"an image of {width} x {height} pixels has nothing left at scale {scale}")
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
    """float32 [H, W, 3] BGR in 0..255 -> float32 [3, H, W], contiguous: (x/255 + shift - mean) / sd.

    The shift (float64 [3], BGR) is added in float64 and rounded once, as the published code does under NumPy 2.
    """
    assert image.dtype == np.float32, image.dtype
    planes = np.array(image.transpose(2, 0, 1), order="C")
    planes /= 255
    if shift is not None:
        planes = (planes + shift[:, None, None]).astype(np.float32)
    planes -= MEAN_BGR[:, None, None]
    planes /= SD_BGR[:, None, None]
    return planes


def lighting_shift(alpha: tuple[float, float, float]) -> np.ndarray:
    """float64 [3]: what PCA lighting adds to blue, green and red of pixels in 0..1."""
    rgb = (LIGHTING_VECTORS * np.asarray(alpha, np.float64) * LIGHTING_VALUES).sum(axis=1)
    return rgb[::-1]


def _resize_shorter(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size`, longer side floored; an image already there is left as it is."""
    height, width = image.shape[:2]
    if min(height, width) == size:
        return image
    if width < height:
        return resize_bilinear(image, size, math.floor(height / width * size))
    return resize_bilinear(image, math.floor(width / height * size), size)


def _centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    y = math.ceil((image.shape[0] - size) / 2)
    x = math.ceil((image.shape[1] - size) / 2)
    return image[y : y + size, x : x + size]
