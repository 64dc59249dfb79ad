"""Normalisation on the device against the published arithmetic, and batches that arrive there."""

import cv2
import numpy as np
import pytest
import torch

from datasets import device
from datasets.device import DeviceBatches, normalise_on_device
from datasets.landmark import LandmarkDataset
from datasets.loader import TrainBatches, make_loader
from datasets.transforms import FastTrainTransform, TrainTransform, lighting_shift, normalise

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT CHECKED: needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 40, 50, 3), (2, 1, 1, 3), (1, 130, 300, 3), (2, 5, 20000, 3)])
def test_normalisation_is_the_published_one(device, shape):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    shift = np.stack([lighting_shift(alpha) for alpha in rng.normal(0, 0.1, (len(images), 3))])
    got = normalise_on_device(
        torch.from_numpy(images).to(device), torch.from_numpy(shift.astype(np.float32)).to(device)
    )
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    for result, image, lighting in zip(got.cpu().numpy(), images, shift, strict=True):
        assert np.abs(result - normalise(image.astype(np.float32), shift=lighting)).max() < 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for i in range(14):
        cv2.imwrite(str(root / f"{i}.png"), rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8))
    (root / "list.txt").write_text("".join(f"{i}.png {i % 5}\n" for i in range(14)))
    return root


def batches_of(folder, device, transform, *, workers=0) -> DeviceBatches:
    dataset = LandmarkDataset(folder, folder / "list.txt", transform=transform, num_classes=5, seed=3)
    batches = TrainBatches(14, batch_size=4, seed=8)
    return DeviceBatches(make_loader(dataset, batches, workers=workers, pin_memory=device == "cuda"), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("transform", [TrainTransform(24), FastTrainTransform(24)])
def test_batches_arrive_in_order_and_stay(folder, device, workers, transform):
    data = batches_of(folder, device, transform, workers=workers)
    dataset = data.loader.dataset
    kept = []
    for epoch, start in ((0, 0), (1, 0), (1, 2)):
        data.loader.batch_sampler.set_epoch(epoch, start=start)
        assert len(data) == 3 - start
        before = len(kept)
        kept += [(epoch, batch) for batch in data]
        assert len(kept) - before == len(data)
    for epoch, batch in kept:
        want = dataset.__getitems__([(epoch, index) for index in batch.indices.tolist()])
        want = want._replace(**{key: torch.from_numpy(getattr(want, key)) for key in ("images", "labels", "shift")})
        images = want.images if want.images.is_floating_point() else normalise_on_device(*want[::3][:2])
        images = images.permute(0, 3, 1, 2) if want.images.is_floating_point() else images
        assert batch.images.device.type == batch.labels.device.type == device
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (4, 3, 24, 24)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.images.cpu() - images).abs().max() < 2e-6
        assert torch.equal(batch.labels.cpu(), want.labels)


def test_memory_is_used_again_once_nothing_looks_at_it(folder):
    data = batches_of(folder, "cpu", FastTrainTransform(24))
    places = {batch.images.data_ptr() for batch in data}
    assert len(places) <= 2
    assert len({batch.images.data_ptr() for batch in list(data)}) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_an_abandoned_iteration_begins_anew(folder, device):
    data = batches_of(folder, device, FastTrainTransform(24), workers=2)
    first = next(iter(data)).indices.tolist()
    data.loader.batch_sampler.set_epoch(0, start=1)
    second = next(iter(data)).indices.tolist()
    data.loader.batch_sampler.set_epoch(0)
    assert [batch.indices.tolist() for batch in data][:2] == [first, second]


def test_all_batches_of_a_run_are_copied_on_one_stream(folder, monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or len(made))
    gpu = torch.device("cuda", 7)
    assert len({device._copies(gpu) for _ in range(3)}) == 1
    assert made == [gpu]
    device._copies.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT CHECKED: needs a GPU")
def test_an_epoch_more_reserves_no_more_memory(folder):
    for _ in range(2):
        list(batches_of(folder, "cuda", FastTrainTransform(24)))
    before = torch.cuda.memory_reserved()
    for _ in range(5):
        list(batches_of(folder, "cuda", FastTrainTransform(24)))
    assert torch.cuda.memory_reserved() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT CHECKED: needs a GPU")
@pytest.mark.parametrize("transform", [TrainTransform(24), FastTrainTransform(24)])
def test_the_host_waits_for_nothing(folder, transform):
    """Warnings of PyTorch's own detector become errors; and the next batch is not held up by the work on this one."""
    data = batches_of(folder, "cuda", transform)
    list(data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data:
            torch.cuda._sleep(10_000_000)
            batch.images.sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
