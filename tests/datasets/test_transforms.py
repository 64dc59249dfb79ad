"""Transforms against goldens of the published code, literal slow versions of themselves, and known values."""

import importlib.util
import json
import math
import struct
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from datasets import transforms
from datasets.images.decode import ImageFile
from datasets.transforms import TrainDraw, draw_train, preprocess, scaled_size, transform_test, transform_train

GOLDENS = Path(__file__).parents[1] / "goldens" / "datasets"
SCALES = ("0.3535", "0.5000", "0.7071", "1.0000", "1.4142")


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def literal_normalise(image: np.ndarray, alpha=None) -> np.ndarray:
    """The published arithmetic channel by channel, with plain numbers."""
    mean, sd = [0.406, 0.456, 0.485], [0.225, 0.224, 0.229]
    values = [0.2175, 0.0188, 0.0045]
    vectors = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    planes = image.transpose(2, 0, 1) / np.float32(255)
    for c in range(3):
        if alpha is not None:
            shift = sum(np.float64(vectors[2 - c][j]) * alpha[j] * values[j] for j in range(3))
            planes[c] = planes[c].astype(np.float64) + shift
        planes[c] = (planes[c] - np.float32(mean[c])) / np.float32(sd[c])
    return planes


def slow_bilinear(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear interpolation in float64 between pixel centres, edges held, no antialiasing."""

    def taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, length - 1), at - low

    a, (y0, y1, dy), (x0, x1, dx) = image.astype(np.float64), taps(image.shape[0], height), taps(image.shape[1], width)
    dy, dx = dy[:, None, None], dx[None, :, None]
    top = a[y0][:, x0] * (1 - dx) + a[y0][:, x1] * dx
    return top * (1 - dy) + (a[y1][:, x0] * (1 - dx) + a[y1][:, x1] * dx) * dy


def assert_golden(got: np.ndarray, want: np.ndarray) -> None:
    """Equal to 1e-6 of the largest value: OpenCV may round differently on another processor."""
    assert np.abs(got.astype(np.float64) - want).max() <= 1e-6 * np.abs(want).max()


# ------------------------------------------------------------------------------------------------ goldens


@pytest.fixture(scope="module")
def golden():
    """Copied from the numbers of the published code: a synthetic image, sampled positions, values there."""
    with np.load(GOLDENS / "transforms.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def golden_image():
    return cv2.imread(str(GOLDENS / "syn_97x161.png"))


@pytest.mark.parametrize("row", range(6))
def test_train_equals_the_published_code(golden, golden_image, row):
    box, flip, alpha = (golden[f"train/{row}/{name}"].tolist() for name in ("box", "flip", "alpha"))
    out = transform_train(golden_image, TrainDraw(tuple(box), flip, tuple(alpha)), 224)
    assert out.dtype == np.float32
    assert out.shape == (3, 224, 224)
    assert_golden(out.reshape(-1)[golden["transform/positions"]], golden[f"train/{row}/values"])


def test_test_equals_the_published_code(golden, golden_image):
    out = transform_test(golden_image, 256, 224)
    assert out.shape == (3, 224, 224)
    assert_golden(out.reshape(-1)[golden["transform/positions"]], golden["test/0/values"])


@pytest.mark.parametrize("scale", SCALES)
def test_preprocess_equals_the_published_code(golden, golden_image, scale):
    out = preprocess(golden_image, float(scale))
    assert out.dtype == np.float32
    assert list(out.shape) == golden[f"preprocess/{scale}/shape"].tolist()
    assert_golden(out.reshape(-1)[golden[f"preprocess/{scale}/positions"]], golden[f"preprocess/{scale}/values"])


def test_every_shared_golden(shared, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # nothing is written into the shared folder
    folder = shared / "goldens"
    spec = importlib.util.spec_from_file_location("golden_recipe", folder / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)

    def image(name: str) -> np.ndarray:
        return cv2.imread(str(folder / "images" / name))

    rows = json.loads((folder / "golden" / "transforms.json").read_text())
    values = np.load(folder / "golden" / "transforms.npz")
    assert len(rows["rows"]) == len(values.files)
    for row in rows["rows"]:
        if "alpha" in row:
            draw = TrainDraw(tuple(row["box_yxhw"]), row["hflip"], tuple(row["alpha"]))
            out = transform_train(image(row["image"]), draw, rows["train_size"])
        else:
            out = transform_test(image(row["image"]), rows["test_resize"], rows["train_size"])
        assert_golden(recipe.sample("transform", out, 1024), values[row["key"]])

    boxes = json.loads((folder / "golden" / "bbox.json").read_text())
    values = np.load(folder / "golden" / "preprocess.npz")
    for name, box in boxes.items():
        x1, y1, x2, y2 = map(int, box)
        for part, pixels in (("full", image(name)), ("crop", image(name)[y1:y2, x1:x2])):
            for scale in SCALES:
                out = preprocess(pixels, float(scale))
                assert list(out.shape) == values[f"{name}/{part}/{scale}/shape"].tolist()
                assert_golden(recipe.sample("pre", out, 512), values[f"{name}/{part}/{scale}/sample"])


# ------------------------------------------------------------------------------------------------ arithmetic


def test_normalise_is_the_published_arithmetic_byte_for_byte():
    image = noise(40, 50).astype(np.float32) + np.float32(0.3)
    assert np.array_equal(transforms.normalise(image), literal_normalise(image))
    alpha = (0.12, -0.03, 0.2)
    shifted = transforms.normalise(image, shift=transforms.lighting_shift(alpha))
    assert shifted.dtype == np.float32
    assert shifted.flags.c_contiguous
    assert np.array_equal(shifted, literal_normalise(image, alpha))


def test_normalise_leaves_its_input_alone():
    image = noise(4, 5).astype(np.float32)
    before = image.copy()
    transforms.normalise(image)
    transforms.normalise(image[:, ::-1])
    assert np.array_equal(image, before)


def test_lighting_known_values():
    # the first component alone, alpha 1: the third row of the vectors belongs to blue
    assert transforms.lighting_shift((1, 0, 0)).tolist() == [-0.5836 * 0.2175, -0.5808 * 0.2175, -0.5675 * 0.2175]
    assert transforms.lighting_shift((0, 0, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("width", "height"), [(224, 224), (31, 200), (113, 57), (7, 5), (90, 70)])
def test_bilinear_against_a_slow_version(width, height):
    image = noise(70, 90).astype(np.float32)
    out = transforms.resize_bilinear(image, width, height)
    assert np.abs(out - slow_bilinear(image, width, height)).max() < 2e-3  # of 255; rounding to uint8 would give 0.5


def test_resize_does_not_depend_on_threads():
    image, threads, outs = noise(600, 800).astype(np.float32), cv2.getNumThreads(), []
    try:
        for count in (0, 2, 5):
            cv2.setNumThreads(count)
            outs.append([transforms.resize_bilinear(image, w, h) for w, h in ((1131, 848), (224, 224), (283, 212))])
    finally:
        cv2.setNumThreads(threads)
    for other in outs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(outs[0], other, strict=True))


def test_train_is_crop_resize_flip_lighting_normalise():
    image, alpha = noise(90, 120), (0.05, -0.1, 0.02)
    crop = cv2.resize(image[10:70, 20:65].astype(np.float32), (32, 32), interpolation=cv2.INTER_LINEAR)
    for flip in (False, True):
        expected = literal_normalise(crop[:, ::-1] if flip else crop, alpha)
        assert np.array_equal(transform_train(image, TrainDraw((10, 20, 60, 45), flip, alpha), 32), expected)


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose pixels tell where they are: blue the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], axis=2).astype(np.uint8)


def corner(planes: np.ndarray) -> tuple[int, int]:
    """Row and column of the first pixel of normalised coordinates."""
    column, row = planes[:2, 0, 0] * transforms.SD_BGR[:2] + transforms.MEAN_BGR[:2]
    return round(row * 255), round(column * 255)


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (64, 64, 64, (0, 0)),
        (64, 64, 60, (2, 2)),
        (64, 64, 59, (3, 3)),  # an odd remainder: the larger half is cut off before
        (64, 101, 60, (2, 21)),
        (91, 64, 64, (14, 0)),
    ],
)
def test_centre_crop_offsets(height, width, size, expected):
    """The image is already at size, so no resize blurs its coordinates."""
    for out in (
        transform_test(coordinates(height, width), 64, size),
        transform_train(coordinates(height, width), TrainDraw(None, False, (0, 0, 0)), size) if size == 64 else None,
    ):
        if out is not None:
            assert out.shape == (3, size, size)
            assert corner(out) == expected


@pytest.mark.parametrize(("height", "width"), [(97, 161), (161, 97), (200, 33), (50, 333), (300, 300)])
def test_test_scales_the_shorter_side_and_floors_the_longer(height, width):
    image = noise(height, width)
    if width < height:
        w, h = 64, math.floor(height / width * 64)
    else:
        w, h = math.floor(width / height * 64), 64
    big = cv2.resize(image.astype(np.float32), (w, h), interpolation=cv2.INTER_LINEAR)
    y, x = math.ceil((h - 48) / 2), math.ceil((w - 48) / 2)
    assert np.array_equal(transform_test(image, 64, 48), literal_normalise(big[y : y + 48, x : x + 48]))


def test_an_image_already_at_size_is_not_resized():
    assert math.floor(54 / 49 * 49) == 53  # scaling by its own size would lose a column
    image = noise(49, 54)
    assert np.array_equal(transform_test(image, 49, 49), literal_normalise(image[:, 3:52].astype(np.float32)))


def test_the_fallback_is_a_centre_crop_of_the_scaled_image():
    image = noise(40, 100)
    fallback = transform_train(image, TrainDraw(None, False, (0, 0, 0)), 32)
    assert np.array_equal(fallback, transform_test(image, 32, 32))
    flipped = transform_train(image, TrainDraw(None, True, (0, 0, 0)), 32)
    assert np.array_equal(flipped, fallback[:, :, ::-1])


SHAPES = [(97, 161), (161, 97), (61, 87), (40, 900), (900, 41), (1, 700), (700, 1), (224, 300), (256, 256), (1, 1)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_what_is_cut_before_resizing_has_the_same_pixels(monkeypatch, height, width):
    image = noise(height, width)
    boxes = [None, (height // 3, width // 4, height - height // 3, width - width // 4)]
    draws = [TrainDraw(box, flip, (0.1, 0, -0.2)) for box in boxes for flip in (False, True)]

    def everything() -> list[np.ndarray]:
        tested = [transform_test(image, *sizes) for sizes in ((256, 224), (64, 64), (97, 31))]
        return tested + [transform_train(image, draw, size) for draw in draws for size in (224, 37)]

    whole = everything()
    monkeypatch.setattr(transforms, "_MOST_WHOLE_PIXELS", 0)
    monkeypatch.setattr(cv2, "resize", None)
    for part, same in zip(everything(), whole, strict=True):
        if min(height, width) > 1:
            assert_golden(part, same)
        else:  # OpenCV has places in float32 there
            assert np.abs(part - same).max() < 1e-4


@pytest.mark.parametrize(("height", "width"), [(1, 60_000), (60_000, 1), (2, 65_500), (8192, 8192)])
@pytest.mark.parametrize("mode", ["train", "test", "fast"])
def test_no_shape_takes_memory_that_its_crop_does_not_need(tmp_path, height, width, mode):
    """Of 1 x 60,000 pixels 36 GB were asked for, of 8192 x 8192 one. Columns and rows tell where the crop is from."""
    image = np.zeros((height, width, 3), np.uint8)
    image[...] = (
        np.linspace(0, 250, max(height, width)).astype(np.uint8).reshape((-1, 1, 1) if height > 2 else (1, -1, 1))
    )
    size = 224
    draw = TrainDraw(None, False, (0, 0, 0))
    tracemalloc.start()
    if mode == "fast":
        crop = np.zeros((size, size, 3), np.uint8)
        transforms.cut_fast(crop, image, draw, box=transforms._box(draw, height, width, size))
    else:
        out = transform_train(image, draw, size) if mode == "train" else transform_test(image, 256, size)
        crop = 255 * (out * transforms.SD_BGR[:, None, None] + transforms.MEAN_BGR[:, None, None])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26
    assert abs(crop.mean() - 125) < 2  # the centre


# ------------------------------------------------------------------------------------------------ scales


def test_scaled_size_rounds_half_to_even():
    assert scaled_size(5, 3, 0.5) == (2, 2)  # 2.5 and 1.5
    assert scaled_size(7, 9, 0.5) == (4, 4)  # 3.5 and 4.5
    assert scaled_size(1024, 768, 0.3535) == (362, 271)
    assert scaled_size(1024, 768, 1.4142) == (1448, 1086)


@pytest.mark.parametrize(("width", "height"), [(1, 100), (100, 1)])
def test_a_side_that_becomes_zero_is_refused(width, height):
    with pytest.raises(ValueError, match=rf"{width} x {height} pixels has nothing left at scale 0\.3535"):
        preprocess(noise(height, width), 0.3535)


@pytest.mark.parametrize("scale", [0.3535, 0.7071, 1.0, 1.4142])
def test_preprocess_resizes_float_and_then_normalises(scale):
    image = noise(75, 101)
    size = (round(101 * scale), round(75 * scale))
    scaled = cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(preprocess(image, scale), literal_normalise(scaled))
    if scale == 1:
        assert np.array_equal(preprocess(image, scale), literal_normalise(image.astype(np.float32)))


# ------------------------------------------------------------------------------------------------ draws


def draws(n: int, height: int, width: int) -> list[TrainDraw]:
    rng = np.random.default_rng(3)
    return [draw_train(rng, height, width) for _ in range(n)]


def test_the_draw_is_a_function_of_the_generator():
    def first(seed: int) -> TrainDraw:
        return draw_train(np.random.default_rng(seed), 60, 80)

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_boxes_lie_inside_and_never_reach_the_last_position():
    for height, width in ((300, 400), (40, 30), (5, 7), (2, 2), (1, 1)):
        for draw in draws(2000, height, width):
            if draw.box is None:
                continue
            y, x, h, w = draw.box
            assert h >= 1
            assert w >= 1
            assert y == 0 if h == height else 0 <= y < height - h  # y = height - h would still fit
            assert x == 0 if w == width else 0 <= x < width - w


def test_box_offsets_reach_both_ends():
    slack = [(y, x, 12 - h, 12 - w) for y, x, h, w in (d.box for d in draws(5000, 12, 12) if d.box)]
    assert any(y == 0 and free > 3 for y, _, free, _ in slack)
    assert any(y == free - 1 and free > 3 for y, _, free, _ in slack)
    assert any(x == free - 1 and free > 3 for _, x, _, free in slack)


def published_boxes(n: int, height: int, width: int) -> tuple[np.ndarray, int]:
    """Sizes (h, w) of accepted crops and the number of fallbacks, drawn another way: all tries at once."""
    rng = np.random.RandomState(11)
    area = rng.uniform(0.08, 1, (n, 10)) * height * width
    aspect = rng.uniform(3 / 4, 4 / 3, (n, 10))
    aspect = np.where(rng.uniform(size=(n, 10)) < 0.5, 1 / aspect, aspect)
    h, w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (h <= height) & (w <= width)
    first, found = fits.argmax(axis=1), fits.any(axis=1)
    rows = np.arange(n)
    return np.stack([h[rows, first], w[rows, first]], axis=1)[found], int((~found).sum())


@pytest.mark.parametrize(("height", "width"), [(1000, 1000), (600, 900), (900, 300)])
def test_sizes_are_distributed_as_published(height, width):
    from scipy.stats import ks_2samp  # takes as long to load as all other imports of a test file

    n = 6000
    got = draws(n, height, width)
    sizes = np.array([d.box[2:] for d in got if d.box is not None])
    want, fallbacks = published_boxes(n, height, width)
    h, w = sizes.T
    assert 0.0795 < (h * w / (height * width)).min() < 0.085
    assert 0.74 < (w / h).min() < 0.76
    assert 1.32 < (w / h).max() < 1.345
    for column in (0, 1):
        assert ks_2samp(sizes[:, column], want[:, column]).pvalue > 1e-4
    assert ks_2samp(w / h, want[:, 1] / want[:, 0]).pvalue > 1e-4
    assert ks_2samp(h * w, want[:, 0] * want[:, 1]).pvalue > 1e-4
    assert abs((n - len(sizes)) - fallbacks) < 6 * math.sqrt(fallbacks + 1)


def test_an_image_no_crop_fits_falls_back():
    assert all(draw.box is None for draw in draws(50, 10, 2000))


def test_flip_and_lighting_are_distributed_as_published():
    got = draws(10000, 50, 50)
    assert abs(np.mean([d.flip for d in got]) - 0.5) < 0.03
    alpha = np.array([d.alpha for d in got])
    assert np.abs(alpha.mean(axis=0)).max() < 0.006
    assert np.abs(alpha.std(axis=0) - 0.1).max() < 0.004
    assert np.abs(np.corrcoef(alpha.T) - np.eye(3)).max() < 0.06


# ------------------------------------------------------------------------------------------------ from file to input


def test_what_the_loader_calls_are_the_functions(tmp_path):
    image = noise(70, 60)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    file, out = ImageFile(tmp_path / "a.png"), np.full((32, 32, 3), np.nan, np.float32)
    for seed in range(6):
        draw = draw_train(np.random.default_rng(seed), 70, 60)
        shift = transforms.TrainTransform(32).write(file, np.random.default_rng(seed), out)
        assert np.array_equal(out.transpose(2, 0, 1), transform_train(image, draw, 32))
        assert shift.tolist() == [0, 0, 0]
    transforms.TestTransform(40, 32).write(file, None, out)
    assert np.array_equal(out.transpose(2, 0, 1), transform_test(image, 40, 32))


def test_normalise_in_blocks(monkeypatch):
    """More pixels than a block, and a source that is no whole array."""
    image, alpha = noise(150, 170).astype(np.float32)[:, 20:], (0.12, -0.03, 0.2)
    assert image.size > 2 * 3 * 8192
    shifted = transforms.normalise(image, shift=transforms.lighting_shift(alpha))
    assert np.array_equal(shifted, literal_normalise(image, alpha))


def landscape(height: int, width: int) -> np.ndarray:
    """Smooth, and different everywhere: a shift by a pixel or a wrong flip shows in the mean."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    planes = [40 + 170 * x, 220 - 180 * y, 120 + 60 * np.sin(5 * x + 3 * y)]
    return np.stack(planes, axis=2).round().astype(np.uint8)


def orientated(jpeg: bytes, orientation: int) -> bytes:
    tiff = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return jpeg[:2] + struct.pack(">BBH", 0xFF, 0xE1, len(tiff) + 8) + b"Exif\0\0" + tiff + jpeg[2:]


@pytest.mark.parametrize("size", [20, 100, 300])  # reduced by up to 8, by up to 2, and enlarged
@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
@pytest.mark.parametrize(("height", "width"), [(240, 320), (241, 333), (40, 900)])
def test_fast_draws_and_cuts_the_same_crop(tmp_path, monkeypatch, size, orientation, height, width):
    _, data = cv2.imencode(".png" if orientation is None else ".jpg", landscape(height, width))
    (tmp_path / "a").write_bytes(data.tobytes() if orientation is None else orientated(data.tobytes(), orientation))
    file, asked = ImageFile(tmp_path / "a"), []
    decode = ImageFile.decode
    monkeypatch.setattr(ImageFile, "decode", lambda self, f=1: asked.append(f) or decode(self, f))
    image, out = decode(file), np.zeros((size, size, 3), np.uint8)
    boxes = reductions = 0
    for seed in range(12):
        draw = draw_train(np.random.default_rng(seed), *image.shape[:2])
        boxes += draw.box is not None
        shift = transforms.FastTrainTransform(size).write(file, np.random.default_rng(seed), out)
        if asked and draw.box is not None:  # as small as it can be, but not smaller than the target
            fitting = [f for f in file.reductions if f * size <= min(draw.box[2:])]
            assert asked.pop() == max(fitting, default=1)
            reductions += len(fitting) > 1
        got = transforms.normalise(out.astype(np.float32), shift=shift)
        difference = 255 * transforms.SD_BGR[:, None, None] * (got - transform_train(image, draw, size))
        assert np.abs(difference.mean((1, 2))).max() < 0.5, draw
        assert np.abs(difference).mean() < 1
        assert np.abs(difference).max() < 12
        assert shift.tolist() == transforms.lighting_shift(draw.alpha).astype(np.float32).tolist()
    assert boxes == 0 if width == 900 else boxes > 6
    if width != 900 and size != 100:
        assert (reductions > 0) == (size == 20 and len(file.reductions) > 1)


@pytest.mark.parametrize("size", [20, 400])
def test_where_the_header_tells_another_size_the_pixels_decide(tmp_path, monkeypatch, size):
    cv2.imwrite(str(tmp_path / "a.jpg"), landscape(240, 320))
    file, out, expected = ImageFile(tmp_path / "a.jpg"), *np.zeros((2, size, size, 3), np.uint8)
    draw = draw_train(np.random.default_rng(4), 240, 320)
    transforms.cut_fast(expected, file.decode(), draw, box=draw.box)
    for told in ((320, 240), (240, 333), None):
        monkeypatch.setattr(ImageFile, "size", told)
        transforms.FastTrainTransform(size).write(file, np.random.default_rng(4), out)
        assert np.array_equal(out, expected)
