"""The fast way of describing images against the plain one, and the pyramid made on a device against cv2's."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from datasets.transforms import preprocess, scaled_size
from evaler.extraction import multiscale
from evaler.extraction.multiscale import (
    MAX_LEVEL_PIXELS,
    describe,
    describe_batch,
    pyramid,
    pyramid_on_device,
    reduce_to_fit,
)
from model.dolg import DOLG
from model.inference import for_inference
from model.resnet import ResNet
from tests.small_run import photograph

SCALES = (0.3535, 0.5, 0.7071, 1.0, 1.4142)


@pytest.fixture(scope="module")
def network() -> DOLG:
    torch.manual_seed(0)
    return DOLG(ResNet(18), dim=32, fusion="global").eval()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - cosine of unit vectors, the largest of all rows."""
    return float((np.square(np.float64(a) - np.float64(b)).sum(axis=-1) / 2).max())


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Noisy ones: smooth pictures hide an error in the resizing."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-40, 41, (count, height, width, 3))
    smooth = np.stack([photograph(seed, height, width) for seed in range(count)])
    return (smooth + noise).clip(0, 255).astype(np.uint8)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(SCALES), st.integers(1, 3))
def test_levels_are_those_of_the_plain_way_bit_for_bit(height, width, scale, count):
    images = np.random.default_rng(height).integers(0, 256, (count, height, width, 3), np.uint8)
    if min(round(height * scale), round(width * scale)) < 1:
        with pytest.raises(ValueError, match="nothing left at scale"):
            list(pyramid(images, (scale,)))
        return
    (level,) = pyramid(images, (scale,))
    assert level.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(level.numpy(), np.stack([preprocess(image, scale) for image in images]))


@pytest.mark.parametrize("size", [(96, 128), (97, 161), (161, 97), (33, 47)])
def test_the_device_makes_the_levels_that_cv2_makes(size, network):
    images = pictures(2, *size)
    levels = list(pyramid_on_device(torch.from_numpy(images), SCALES))
    for scale, level in zip(SCALES, levels, strict=True):
        wanted = np.stack([preprocess(image, scale) for image in images])
        assert level.shape == wanted.shape
        # Of pixels in 0..255 divided by 255 * 0.22. One cv2 weight has 11 bits in uint8, but is a float here.
        assert np.abs(level.numpy() - wanted).max() < 2e-5
    with torch.no_grad():
        sums = sum(F.normalize(network(level)) for level in levels)
    wanted = np.stack([describe(network, image, scales=SCALES).numpy() for image in images])
    assert distance(F.normalize(sums).numpy(), wanted) < 1e-11


def test_a_gpu_is_given_the_uint8_pictures_once(network, monkeypatch):
    """The way of a GPU, with the CPU in its place: which functions it goes through."""
    images = pictures(3, 60, 80)
    copied = []
    monkeypatch.setattr(multiscale, "_copied", lambda given, device: copied.append(given) or given)
    monkeypatch.setattr(multiscale, "_is_cpu", lambda device: False)
    monkeypatch.setattr(multiscale, "pyramid", None)
    found = describe_batch(network, images, scales=SCALES)
    (given,) = copied
    assert given.dtype == torch.uint8 and np.array_equal(given.numpy(), images)
    assert distance(found, np.stack([describe(network, image, scales=SCALES).numpy() for image in images])) < 1e-11


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_batch_is_described_as_its_images_are(kind, network):
    images = pictures(3, 75, 107)
    arranged = for_inference(network)
    given = images if kind == "numpy" else torch.from_numpy(images)
    found = describe_batch(arranged, given, scales=SCALES)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    single = np.concatenate([describe_batch(arranged, image[None], scales=SCALES) for image in images])
    plain = np.stack([describe(network, image, scales=SCALES).numpy() for image in images])
    for other in (single, plain):
        assert distance(found, other) < 1e-11 and np.abs(found - other).max() < 1e-6
    assert distance(found[:1], found[1:2]) > 1e-6, "the network tells the pictures apart"


def test_one_image_twice_is_the_same_bytes(network):
    arranged, images = for_inference(network), pictures(1, 75, 107)
    assert (
        describe_batch(arranged, images, scales=SCALES).tobytes()
        == describe_batch(arranged, images.copy(), scales=SCALES).tobytes()
    )


def test_scales_are_weighed_equally_and_descriptors_normalised_first():
    """A stand-in network whose descriptor's length grows with the level's size."""

    class Sizes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, level: torch.Tensor) -> torch.Tensor:
            h, w = level.shape[2:]
            return torch.tensor([[h * 3.0, w * 4.0]]).expand(len(level), 2)

    found = describe_batch(Sizes(), pictures(2, 40, 40), scales=(0.5, 1.0))
    np.testing.assert_allclose(found, [[0.6, 0.8]] * 2, rtol=1e-6)
    found = describe_batch(Sizes(), np.concatenate([pictures(1, 40, 40)[:, :20]] * 2), scales=(1.0,))
    np.testing.assert_allclose(found, [[60 / math.hypot(60, 160), 160 / math.hypot(60, 160)]] * 2, rtol=1e-6)


def test_what_is_no_batch_of_pixels_is_our_mistake(network):
    for wrong in (pictures(1, 20, 20)[0], pictures(1, 20, 20).astype(np.float32), pictures(1, 20, 20)[:0]):
        with pytest.raises(AssertionError):
            describe_batch(network, wrong, scales=(1.0,))


# --------------------------------------------------------------------------------------------------- the largest level


@given(
    st.integers(16, 400),
    st.integers(16, 400),
    st.sampled_from([SCALES, (1.0,), (0.5,), (2.0, 1.0)]),
    st.integers(64, 40_000),
)
def test_what_is_reduced_fits_and_only_just(height, width, scales, most):
    image = np.zeros((height, width, 3), np.uint8)
    found = reduce_to_fit(image, scales=scales, max_pixels=most)
    h, w = found.shape[:2]
    if math.prod(scaled_size(width, height, max(scales))) <= most:
        assert found is image
        return
    level = math.prod(scaled_size(w, h, max(scales)))
    assert level <= most and h <= height and w <= width and (h, w) != (height, width)
    # A pixel of the level more on both sides would be too many.
    more = w + (1 + math.ceil(1 / max(scales))) * (1 + math.ceil(width / height))
    if width >= height and more <= width:
        assert math.prod(scaled_size(more, max(1, round(height * more / width)), max(scales))) > most
    long, short = (w, h) if width >= height else (h, w)
    assert abs(short - max(1, long * min(height, width) / max(height, width))) <= 0.5
    assert reduce_to_fit(found, scales=scales, max_pixels=most) is found


def test_a_reduced_picture_is_averaged_over_areas():
    image = pictures(1, 200, 300)[0]
    found = reduce_to_fit(image, scales=(1.0,), max_pixels=50 * 75)
    assert found.shape == (50, 75, 3)
    mean = image.reshape(50, 4, 75, 4, 3).mean(axis=(1, 3))
    assert np.abs(found - mean).max() <= 0.5


def test_describing_reduces_by_itself(network):
    images = pictures(2, 120, 160)
    most = 100 * 133
    found = describe_batch(network, images, scales=(0.5, 1.0), max_pixels=most)
    reduced = [reduce_to_fit(image, scales=(0.5, 1.0), max_pixels=most) for image in images]
    assert reduced[0].shape == (100, 133, 3)
    wanted = np.stack([describe(network, image, scales=(0.5, 1.0)).numpy() for image in reduced])
    assert distance(found, wanted) < 1e-11
    assert distance(found, describe_batch(network, images, scales=(0.5, 1.0))) > 1e-9


def test_the_default_leaves_eight_megapixels_untouched_and_takes_48():
    small = np.zeros((2500, 3340, 3), np.uint8)
    assert reduce_to_fit(small, scales=SCALES) is small
    large = cv2.resize(np.zeros((6, 8, 3), np.uint8), (8000, 6000))
    reduced = reduce_to_fit(large, scales=SCALES)
    level = math.prod(scaled_size(reduced.shape[1], reduced.shape[0], SCALES[-1]))
    assert 0.998 * MAX_LEVEL_PIXELS < level <= MAX_LEVEL_PIXELS
    assert reduced.shape[1] / reduced.shape[0] == pytest.approx(8 / 6, rel=1e-3)
