"""JPEGs decoded elsewhere than by libjpeg-turbo: what stands around nvJPEG, with a decoder of the CPU in its place."""

import importlib.util
import sys

import cv2
import numpy as np
import pytest
import torch

from datasets.images.decode import decode
from evaler.extraction import gpu_jpeg
from evaler.extraction.pictures import Broken, Encoded, Limits, Pictures, decoded
from evaler.sources.image_list import ImageList, LooseFiles
from tests.broken_inputs import exif
from tests.small_run import cut_short, photograph, write_image

LIMITS = Limits((0.5, 2.0), min_side=16, max_aspect=5.0, max_pixels=10_000, max_level_pixels=4 * 60 * 60)


def stand_in(data: torch.Tensor) -> torch.Tensor:
    """As nvJPEG: RGB [3, H, W] as stored, whatever EXIF says; here with libjpeg's pixels."""
    image = cv2.imdecode(data.numpy(), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)


def refuses(data: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("nvjpegDecode failed: 2")


def images_of(folder, names, boxes=None) -> ImageList:
    return ImageList(names, LooseFiles(folder, names), boxes)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_and_cropped_as_by_the_other_decoder(tmp_path, orientation):
    path = write_image(tmp_path / "a.jpg", photograph(orientation, 40, 56))
    data = path.read_bytes()
    path.write_bytes(data[:2] + exif(orientation) + data[2:])
    images = images_of(tmp_path, ["a.jpg", "b.jpg"], [None, (3.7, 2, 35, 38)])
    (tmp_path / "b.jpg").write_bytes(path.read_bytes())
    pictures = Pictures(images, LIMITS, on_gpu=stand_in)
    upright = decode(path)
    for index, expected in ((0, upright), (1, upright[2:38, 3:35])):
        item = pictures.decoder[index]
        assert isinstance(item, Encoded)
        picture = pictures.finished(item)
        np.testing.assert_array_equal(picture.pixels.numpy(), expected)
        assert picture.size == expected.shape[1::-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_no_plain_jpeg_is_decoded_as_without_it(tmp_path, workers):
    names = ["a.jpg", "b.png", "cut.jpg", "small.jpg", "large.jpg", "reduced.jpg"]
    for name, side in zip(names, (40, 40, 40, 15, 101, 90), strict=True):
        write_image(tmp_path / name, photograph(side, side, side))
    cut_short(tmp_path / "cut.jpg")
    images = images_of(tmp_path, names)
    plain, other = (
        list(decoded(Pictures(images, LIMITS, on_gpu=decoder), range(6), workers=workers))
        for decoder in (None, stand_in)
    )
    for a, b in zip(plain, other, strict=True):
        assert type(a) is type(b) and a.index == b.index
        if isinstance(a, Broken):
            assert a == b
        else:
            assert a.size == b.size and torch.equal(a.pixels, b.pixels)
    assert [item.index for item in plain if isinstance(item, Broken)] == [2, 3, 4]


def test_a_jpeg_that_the_gpu_refuses_is_decoded_by_libjpeg(tmp_path):
    path = write_image(tmp_path / "a.jpg", photograph(0))
    (picture,) = decoded(Pictures(images_of(tmp_path, ["a.jpg"]), LIMITS, on_gpu=refuses), [0], workers=0)
    np.testing.assert_array_equal(picture.pixels.numpy(), decode(path))


def test_a_box_outside_the_picture(tmp_path):
    write_image(tmp_path / "a.jpg", photograph(0))
    images = images_of(tmp_path, ["a.jpg"], [(500, 500, 600, 600)])
    plain, other = (next(decoded(Pictures(images, LIMITS, on_gpu=d), [0], workers=0)) for d in (None, stand_in))
    assert plain == other and "outside" in plain.reason


def test_torchvision_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(ValueError, match="INFER.GPU_JPEG needs torchvision") as caught:
        gpu_jpeg.nvjpeg()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("torchvision") is None,
    reason="needs a GPU and torchvision",
)
def test_nvjpeg_is_close_to_libjpeg(tmp_path):
    path = write_image(tmp_path / "a.jpg", photograph(0, 200, 300))
    limits = Limits((1.0,), min_side=16, max_aspect=5.0, max_pixels=10**6, max_level_pixels=10**6)
    (picture,) = decoded(Pictures(images_of(tmp_path, ["a.jpg"]), limits, on_gpu=gpu_jpeg.nvjpeg()), [0], workers=0)
    assert picture.pixels.is_cuda
    difference = np.abs(picture.pixels.cpu().numpy().astype(int) - decode(path).astype(int))
    assert difference.mean() < 2 and difference.max() < 32
