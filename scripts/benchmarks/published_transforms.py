"""The published loading, plainly: what `scripts/benchmark.py loader` measures ours against. Training does not use it.

The steps, their order, number types and array layouts are the published ones; only the draws come from
`transforms.draw_train`, so that both sides cut the same crops.
"""

import cv2
import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from torch.utils.data import Dataset

from datasets.transforms import LIGHTING_VALUES, LIGHTING_VECTORS, TrainDraw, draw_train

MEAN = [0.406, 0.456, 0.485]
SD = [0.225, 0.224, 0.229]


def published_transform(image: np.ndarray, draw: TrainDraw, size: int) -> np.ndarray:
    """float32 [H, W, 3] BGR -> float32 [3, size, size], a view that is not contiguous."""
    if draw.box is None:
        image = _scaled(image, size)
        y, x = (int(np.ceil((side - size) / 2)) for side in image.shape[:2])
        image = image[y : y + size, x : x + size]
    else:
        y, x, h, w = draw.box
        image = cv2.resize(image[y : y + h, x : x + w], (size, size), interpolation=cv2.INTER_LINEAR)
    if draw.flip:
        image = image[:, ::-1]
    planes = image.transpose(2, 0, 1) / 255.0
    shift_rgb = np.sum(LIGHTING_VECTORS * np.array(draw.alpha) * LIGHTING_VALUES, axis=1)
    for channel in range(3):
        planes[channel] = planes[channel] + shift_rgb[2 - channel]  # in float64
    for channel in range(3):
        planes[channel] = planes[channel] - MEAN[channel]
        planes[channel] = planes[channel] / SD[channel]
    return planes


def _scaled(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    if min(height, width) == size:
        return image
    w, h = (size, int(height / width * size)) if width < height else (int(width / height * size), size)
    return cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)


class PublishedDataset(Dataset):
    """Samples (float32 [3, size, size], label) of these files, drawn as `LandmarkDataset` draws them in epoch 0.

    For a plain `DataLoader` with its default collation, which copies the channels apart.
    """

    def __init__(self, paths: list[str], labels: list[int], *, size: int, seed: int) -> None:
        self._paths, self._labels, self._size, self._seed = paths, labels, size, seed

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = cv2.imread(self._paths[index])
        assert image is not None, self._paths[index]
        image = image.astype(np.float32, copy=False)
        rng = Generator(PCG64(SeedSequence([self._seed, 0, index])))
        return published_transform(image, draw_train(rng, *image.shape[:2]), self._size), self._labels[index]
