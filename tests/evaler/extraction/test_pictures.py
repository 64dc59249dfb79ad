"""Pictures on their way to the network: which are refused, which share a batch, in what order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from core.base.errors import entry_point
from datasets.images.decode import decode
from evaler.extraction import pictures
from evaler.extraction.pictures import Broken, Limits, Picture, Pictures, by_size, decoded
from evaler.sources.images import named_images
from tests.loader_sets import Killed
from tests.small_run import cut_short, photograph, write_image

LIMITS = Limits((0.5, 2.0), min_side=16, max_aspect=5.0, max_pixels=10_000, max_level_pixels=4 * 60 * 60)


def picture(index, height, width):
    return Picture(index, torch.zeros(height, width, 3, dtype=torch.uint8), (width, height))


def groups(sizes, batch_size, limits=LIMITS):
    found = by_size((picture(i, *size) for i, size in enumerate(sizes)), limits, batch_size=batch_size)
    return [[member.index for member in group] for group in found]


A, B, C = (20, 30), (30, 20), (20, 31)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "expected"),
    [
        ([], 4, []),
        ([A, B, A, C], 1, [[0], [1], [2], [3]]),
        ([A, B, A, C, B, A], 2, [[0, 2], [1, 4], [3], [5]]),
        ([A, A, A, A, A], 2, [[0, 1], [2, 3], [4]]),
        ([A, B, C], 8, [[0], [1], [2]]),
        ([A] * 7, 3, [[0, 1, 2], [3, 4, 5], [6]]),
    ],
)
def test_pictures_of_one_size_share_a_batch(sizes, batch_size, expected):
    assert groups(sizes, batch_size) == expected


def test_every_picture_comes_once_whatever_the_sizes():
    rng = np.random.default_rng(0)
    sizes = [(20 + a, 20 + b) for a, b in rng.integers(0, 3, (200, 2)).tolist()]
    for batch_size in (1, 3, 8):
        found = groups(sizes, batch_size)
        assert sorted(index for group in found for index in group) == list(range(200))
        assert all(len({sizes[index] for index in group}) == 1 and group == sorted(group) for group in found)


def test_the_largest_level_bounds_a_batch():
    """At scale 2 a picture of 60 x 60 has 14,400 pixels, all that the limit allows; of 30 x 60 there may be two."""
    assert groups([(60, 60)] * 3, 8) == [[0], [1], [2]]
    assert groups([(30, 60)] * 5, 8) == [[0, 1], [2, 3], [4]]


def test_waiting_pictures_are_bounded_and_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_WAITING_BYTES", 3 * 20 * 31 * 3)  # three of them
    assert groups([A, B, C, A, (21, 20)], 8) == [[0, 3], [1], [2], [4]]


@pytest.fixture
def folder(tmp_path) -> Path:
    for index, (height, width) in enumerate([(40, 48), (15, 40), (100, 101), (20, 99), (101, 20), (90, 90)]):
        write_image(tmp_path / "photos" / f"{index}.png", photograph(index, height, width))
    (tmp_path / "photos" / "6.png").write_bytes(b"")
    cut_short(write_image(tmp_path / "photos" / "7.jpg", photograph(7)))
    return tmp_path / "photos"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_described_and_what_is_refused_and_why(folder, workers):
    images, _ = named_images(folder)
    items = list(decoded(Pictures(images, LIMITS), range(8), workers=workers))
    assert [item.index for item in items] == list(range(8))
    reasons = {item.index: item.reason for item in items if isinstance(item, Broken)}
    assert sorted(reasons) == [1, 2, 4, 6, 7]
    assert reasons[1] == "40 x 15 pixels, its shorter side is below INFER.MIN_SIDE 16"
    assert "101 x 100 pixels" in reasons[2] and "10000" in reasons[2].replace(",", "")
    assert reasons[4] == "20 x 101 pixels, longer than INFER.MAX_ASPECT 5 to 1"
    assert "empty" in reasons[6] and "truncated" in reasons[7]
    assert not any(str(folder) in reason for reason in reasons.values())
    np.testing.assert_array_equal(items[0].pixels.numpy(), decode(folder / "0.png"))
    assert items[0].size == (48, 40)
    assert items[5].size == (90, 90) and max(items[5].pixels.shape) == 60  # more than the limit at scale 2


def test_a_picture_that_vanishes_at_a_scale(folder):
    images, _ = named_images(folder)
    limits = Limits((0.01,), min_side=1, max_aspect=50.0, max_pixels=10_000, max_level_pixels=10_000)
    (item,) = decoded(Pictures(images, limits), [3], workers=0)
    assert isinstance(item, Broken)
    assert (item.index, item.reason) == (3, "an image of 99 x 20 pixels has nothing left at scale 0.01")


def test_a_killed_decoder_ends_the_command_with_one_line(folder, capsys):
    images, _ = named_images(folder)

    @entry_point
    def command():
        pictures = Pictures(images, LIMITS)
        pictures.decoder = Killed(images, LIMITS, leave_jpegs=False)
        list(decoded(pictures, range(6), workers=1))

    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: loader worker 0 (process ") and line.endswith("Run this again to go on")
