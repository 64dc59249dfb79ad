"""The published loading that the benchmark measures against, held to the published numbers and to ours."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets.landmark import LandmarkDataset
from datasets.transforms import TrainDraw, TrainTransform, draw_train, transform_train
from scripts.benchmarks.published_transforms import PublishedDataset, published_transform

GOLDENS = Path(__file__).parents[2] / "goldens" / "datasets"


@pytest.mark.parametrize("row", range(6))
def test_goldens(row):
    image = cv2.imread(str(GOLDENS / "syn_97x161.png")).astype(np.float32)
    with np.load(GOLDENS / "transforms.npz") as golden:
        box, flip, alpha = (golden[f"train/{row}/{name}"].tolist() for name in ("box", "flip", "alpha"))
        positions, values = golden["transform/positions"], golden[f"train/{row}/values"]
    out = published_transform(image, TrainDraw(tuple(box), flip, tuple(alpha)), 224)
    assert out.dtype == np.float32
    assert np.abs(np.ascontiguousarray(out).reshape(-1)[positions] - values).max() <= 1e-6 * np.abs(values).max()


@pytest.mark.parametrize(("height", "width"), [(120, 170), (171, 121), (20, 400), (400, 20), (32, 500)])
def test_ours_equals_it_byte_for_byte(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for seed in range(8):
        draw = draw_train(np.random.default_rng(seed), height, width)
        published = published_transform(image.astype(np.float32), draw, 32)
        assert np.array_equal(published, transform_train(image, draw, 32))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plain_loader_gives_the_batches_of_ours(tmp_path, workers):
    rng = np.random.default_rng(0)
    for i in range(5):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), rng.integers(0, 256, (60 + i, 50, 3), dtype=np.uint8))
    (tmp_path / "list.txt").write_text("".join(f"{i}.jpg {i % 2}\n" for i in range(5)))
    ours = LandmarkDataset(tmp_path, tmp_path / "list.txt", transform=TrainTransform(24), num_classes=2, seed=3)
    paths = [ours.path(i) for i in range(5)]
    published = PublishedDataset(paths, ours.labels.tolist(), size=24, seed=3)
    images, labels = next(iter(DataLoader(published, batch_size=5, num_workers=workers)))
    want = ours.__getitems__([(0, i) for i in range(5)])
    assert torch.equal(images, torch.from_numpy(want.images).permute(0, 3, 1, 2))
    assert labels.tolist() == want.labels.tolist()
