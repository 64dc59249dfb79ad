"""Decoding: the pixels of cv2.imread, and a one-line error for everything that is not a complete image."""

import hashlib
import json
import struct
import zlib

import cv2
import numpy as np
import pytest

from datasets.images import decode as image_module
from datasets.images.decode import ImageError, ImageFile, decode
from tests.broken_inputs import chunk, exif, flat_jpeg, png, segment, tiff

JPEG = {
    "baseline": [],
    "4:4:4": [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
    "quality 20": [cv2.IMWRITE_JPEG_QUALITY, 20],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 2],
    "progressive, restarts": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2],
}


def picture(height: int = 61, width: int = 87, channels: int = 3) -> np.ndarray:
    """Smooth shapes and noise, so that compressed data hold every byte value."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:height, :width]
    smooth = 120 + 80 * np.sin(np.stack([x / (5 + c) + y / (9 - c) for c in range(channels)], axis=2))
    return np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image: np.ndarray, extension: str, parameters: list[int] | None = None) -> bytes:
    done, data = cv2.imencode(extension, image, parameters or [])
    assert done
    return data.tobytes()


def with_exif(jpeg: bytes, orientation: int, thumbnail: bytes = b"") -> bytes:
    return jpeg[:2] + exif(orientation, thumbnail) + jpeg[2:]


def written(tmp_path, data: bytes, name: str = "image.jpg") -> str:
    path = tmp_path / name
    path.write_bytes(data)
    return str(path)


def refusal(path) -> str:
    with pytest.raises(ImageError) as caught:
        decode(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------ accepted


FILES = {
    **{f"{name}.jpg": encoded(picture(), ".jpg", parameters) for name, parameters in JPEG.items()},
    "grey.jpg": encoded(picture(channels=1), ".jpg"),
    "colour.png": encoded(picture(), ".png"),
    "grey.png": encoded(picture(channels=1), ".png"),
    "alpha.png": encoded(picture(channels=4), ".png"),
    "grey16.png": encoded(picture(channels=1).astype(np.uint16) * 257 + 100, ".png"),
    "colour16.png": encoded(picture().astype(np.uint16) * 256 + 200, ".png"),
    "colour.bmp": encoded(picture(), ".bmp"),
    "colour.webp": encoded(picture(), ".webp"),
    "colour.tiff": encoded(picture(), ".tiff"),
}


@pytest.mark.parametrize("name", FILES)
def test_equals_imread(tmp_path, name):
    path = written(tmp_path, FILES[name], name.replace(":", "-"))
    image = decode(path)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.shape == (61, 87, 3)
    assert np.array_equal(image, cv2.imread(path))


@pytest.mark.parametrize("name", FILES)
def test_data_can_be_handed_in(tmp_path, name):
    expected = decode(written(tmp_path, FILES[name]))
    assert np.array_equal(decode("shard.tar/image.jpg", FILES[name]), expected)
    for broken, reason in ((b"", "the file is empty"), (FILES[name][: len(FILES[name]) // 2], "truncated")):
        with pytest.raises(ImageError, match=rf"^shard\.tar/image\.jpg: {reason}"):
            decode("shard.tar/image.jpg", broken)


@pytest.mark.parametrize("sampling", [0x111111, 0x211111, 0x221111, 0x411111, 0x121111])
@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("with_simplejpeg", [True, False])
def test_jpegs_equal_opencv_with_and_without_simplejpeg(monkeypatch, capfd, sampling, progressive, with_simplejpeg):
    if not with_simplejpeg:
        monkeypatch.setattr(image_module, "simplejpeg", None)
    parameters = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
    data = encoded(picture(75, 53), ".jpg", parameters)
    for orientation in range(9):
        turned = with_exif(data, orientation)
        image = decode("x", turned)
        assert np.array_equal(image, cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR)), orientation
        assert image.flags.c_contiguous
    assert capfd.readouterr() == ("", "")


def random_png(rng: np.random.Generator, colour: int, depth: int, interlaced: int, *extra: bytes) -> bytes:
    """13 x 7 random pixels with random filters, `extra` chunks, and a palette where one is needed."""
    bits, rows = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour], b""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    for x, y, right, down in passes if interlaced else [(0, 0, 1, 1)]:
        for _ in range(y, 7, down):
            rows += bytes([rng.integers(0, 5)]) + rng.bytes(-(-len(range(x, 13, right)) * bits // 8))
    header = struct.pack(">IIBBBBB", 13, 7, depth, colour, 0, 0, interlaced)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra)
    data += chunk(b"PLTE", rng.bytes(3 << depth)) if colour == 3 else b""
    data += chunk(b"tRNS", {0: bytes(2), 2: bytes(6), 3: b"\7"}[colour]) if colour not in (4, 6) else b""
    idat = zlib.compress(rows)
    return data + chunk(b"IDAT", idat[:9]) + chunk(b"IDAT", idat[9:]) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(
    ("colour", "depths"), {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items()
)
def test_what_is_left_out_of_a_png_does_not_change_its_pixels(capfd, colour, depths, interlaced):
    rng = np.random.default_rng(5)
    gamma, text = chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"tEXt", b"Author\0somebody")
    for depth in depths:
        data = random_png(rng, colour, depth, interlaced, gamma, text)
        image = decode("x", data)
        assert image.std() > 20
        assert np.array_equal(image, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)), depth
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("after", [False, True])
def test_the_orientation_of_a_png_is_applied(after):
    tag = chunk(b"eXIf", exif(6)[10:])
    rows = zlib.compress(b"".join(b"\0" + row[:, ::-1].tobytes() for row in picture()))
    data = png(87, 61, rows, before=b"" if after else tag)
    data = data[:-12] + tag + data[-12:] if after else data
    opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(decode("x", data), opencv)
    assert np.array_equal(decode("x", data), np.rot90(picture(), -1))


def rgb_tiff(values: np.ndarray, **changed: list[int]) -> bytes:
    """uint8 or uint16 [H, W, C], as they are; tags by `t` and their number."""
    bits, channels = 8 * values.itemsize, values.shape[2]
    tags = {258: [bits] * channels, 277: [channels]} | {int(tag[1:]): value for tag, value in changed.items()}
    return tiff(values.shape[1], values.shape[0], [values.tobytes()], rows=values.shape[0], changed=tags)


def test_tiffs_are_converted_as_documented():
    image = picture()
    rgb, grey = np.ascontiguousarray(image[..., ::-1]), image[..., :1].copy()
    wide, half = np.random.default_rng(2).integers(0, 65536, (61, 87, 3), dtype=np.uint16), np.full_like(grey, 128)
    three = np.repeat(grey, 3, axis=2)
    expected = {
        "grey": (rgb_tiff(grey, t262=[1]), three),
        "grey, white is 0": (rgb_tiff(grey, t262=[0]), 255 - three),
        "grey, 16 bits": (rgb_tiff(wide[..., :1], t262=[1]), np.repeat(wide[..., :1] >> 8, 3, axis=2)),
        "grey and alpha": (rgb_tiff(np.dstack([grey, half]), t262=[1], t338=[2]), three),
        "16 bits": (rgb_tiff(wide), np.rint(wide[..., ::-1] / 65535 * 255)),
        "alpha, multiplied in": (rgb_tiff(np.dstack([rgb, half]), t338=[1]), image),
        "alpha, not multiplied in": (rgb_tiff(np.dstack([rgb, half]), t338=[2]), np.rint(image * (128 / 255))),
    }
    for name, (data, pixels) in expected.items():
        assert np.array_equal(decode("x", data), pixels), name
        assert np.array_equal(decode("x", data), cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)), name


def test_a_path_object_is_taken(tmp_path):
    written(tmp_path, FILES["colour.png"], "a b.png")
    assert np.array_equal(decode(tmp_path / "a b.png"), picture())


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: a.transpose(1, 0, 2)[:, ::-1]),
        (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda a: a.transpose(1, 0, 2)[::-1]),
    ],
)
def test_exif_orientation_is_applied(tmp_path, orientation, upright):
    path = written(tmp_path, with_exif(FILES["baseline.jpg"], orientation))
    stored = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    image = decode(path)
    assert np.array_equal(image, upright(stored))
    assert image.flags.c_contiguous


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = picture(channels=1)
    image = decode(written(tmp_path, encoded(grey, ".png")))
    assert np.array_equal(image, np.repeat(grey, 3, axis=2))


def test_sixteen_bits_keep_their_high_byte(tmp_path):
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = decode(written(tmp_path, encoded(every, ".png")))
    assert np.array_equal(image[..., 0], every // 256)


def test_alpha_is_dropped_not_blended(tmp_path):
    image = picture(channels=4)
    image[..., 3] = 0
    assert np.array_equal(decode(written(tmp_path, encoded(image, ".png"))), image[..., :3])


def test_palette_is_expanded(tmp_path):
    indices = np.arange(20, dtype=np.uint8).reshape(4, 5) % 3
    palette_rgb = bytes([10, 20, 30, 40, 50, 60, 70, 80, 90])
    rows = b"".join(b"\0" + row.tobytes() for row in indices)
    header = struct.pack(">IIBBBBB", 5, 4, 8, 3, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", palette_rgb)
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    image = decode(written(tmp_path, data))
    expected_bgr = np.array([[30, 20, 10], [60, 50, 40], [90, 80, 70]], np.uint8)
    assert np.array_equal(image, expected_bgr[indices])


THUMBNAIL = encoded(picture(12, 16), ".jpg")
END = b"\xff\xd9"


@pytest.mark.parametrize("kind", JPEG)
def test_harmless_oddities_of_a_jpeg_are_accepted(tmp_path, kind):
    plain = FILES[f"{kind}.jpg"]
    pixels = decode(written(tmp_path, plain))
    odd = {
        "thumbnail": with_exif(plain, 1, THUMBNAIL),
        "trailing text": plain + b"written by a camera",
        "trailing zeros": plain + bytes(4096),
        "trailing image": plain + THUMBNAIL,
        "trailing end": plain + b"x" + END,
        "end marker in a comment": plain[:2] + segment(0xFE, b"a" + END + b"b") + plain[2:],
        "fill bytes before the end": plain[:-2] + b"\xff\xff" + END,
    }
    for data in odd.values():
        assert np.array_equal(decode(written(tmp_path, data)), pixels)


def test_bytes_behind_a_png_are_accepted(tmp_path):
    assert np.array_equal(decode(written(tmp_path, FILES["colour.png"] + b"more")), picture())


# ------------------------------------------------------------------------------------------------ parts of an image


@pytest.mark.parametrize("name", FILES)
def test_the_size_is_told_for_every_jpeg(tmp_path, name):
    file = ImageFile(written(tmp_path, FILES[name]))
    assert file.size == ((61, 87) if name.endswith(".jpg") else None)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_size_is_that_of_the_upright_image(tmp_path, orientation, order):
    data = with_exif(FILES["baseline.jpg"], orientation, THUMBNAIL)
    if order == ">":
        tiff = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
        data = FILES["baseline.jpg"][:2] + segment(0xE1, b"Exif\0\0" + tiff) + FILES["baseline.jpg"][2:]
    file = ImageFile(written(tmp_path, data))
    assert file.size == file.decode().shape[:2]
    assert file.size == ((87, 61) if orientation > 4 else (61, 87))


@pytest.mark.parametrize("kind", [*JPEG, "grey"])
@pytest.mark.parametrize("orientation", [None, 1, 6])
def test_rows_are_those_of_the_whole_image(tmp_path, monkeypatch, capfd, kind, orientation):
    data = FILES[f"{kind}.jpg"]
    file = ImageFile(written(tmp_path, data if orientation is None else with_exif(data, orientation)))
    whole = file.decode()
    for end in (1, 7, 8, 15, 16, 17, 40, 59, 60, 61, 87):
        if end <= len(whole):
            rows = file.decode_rows(end)
            assert len(rows) >= end
            assert np.array_equal(rows, whole[: len(rows)]), end
            partial = image_module.simplejpeg and "progressive" not in kind and orientation != 6 and end < 60
            assert (len(rows) == end) == bool(partial or end == len(whole)), end
    monkeypatch.setattr(image_module, "simplejpeg", None)
    assert np.array_equal(file.decode_rows(7), whole)
    assert capfd.readouterr() == ("", "")


def test_a_sequential_jpeg_of_several_scans_is_not_cut(tmp_path):
    """One scan a colour: the first rows of all three are not at the beginning of the file."""
    planes = [encoded(picture(channels=1) // (1 + c), ".jpg") for c in range(3)]
    frame, scan = planes[0].index(b"\xff\xc0"), planes[0].index(b"\xff\xda")
    size = planes[0][frame + 5 : frame + 9]
    data = planes[0][:frame] + segment(
        0xC0, b"\x08" + size + b"\x03" + b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    )
    data += planes[0][frame + 13 : scan]  # the Huffman tables
    for c, plane in enumerate(planes, start=1):
        data += segment(0xDA, bytes([1, c, 0, 0, 63, 0])) + plane[scan + 10 : -2]
    file = ImageFile(written(tmp_path, data + END))
    whole = file.decode()
    assert whole.std(axis=(0, 1)).min() > 5
    assert file.size == (61, 87)
    assert np.array_equal(file.decode_rows(20), whole)


@pytest.mark.parametrize("kind", [*JPEG, "grey"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("height", "width", "reductions"), [(152, 208, [1, 2, 4, 8]), (150, 205, [1])])
def test_a_reduced_decode_is_about_the_mean_of_blocks(tmp_path, kind, orientation, height, width, reductions):
    y, x = np.mgrid[:height, :width]
    big = np.stack([x + 20 * np.sin(y / 15), 230 - y, 100 + x / 4 + y / 4], axis=2).clip(0, 255).astype(np.uint8)
    data = encoded(big if kind != "grey" else big[..., 0], ".jpg", JPEG.get(kind))
    file = ImageFile(written(tmp_path, with_exif(data, orientation)))
    assert file.reductions == ([1, 2, 4, 8] if orientation == 1 else reductions)
    whole = file.decode().astype(int)
    for f in file.reductions:
        reduced = file.decode(f)
        h, w = (side // f for side in whole.shape[:2])
        assert reduced.shape == (*(-(-side // f) for side in whole.shape[:2]), 3)
        blocks = whole[: h * f, : w * f].reshape(h, f, w, f, 3).mean((1, 3))
        assert np.abs((reduced[:h, :w] - blocks).mean((0, 1))).max() < 0.3  # a shift by a pixel gives 1
        assert np.abs(reduced[:h, :w] - blocks).mean() < 2


def test_only_a_jpeg_is_reduced(tmp_path):
    assert ImageFile(written(tmp_path, FILES["colour.png"])).reductions == [1]


def test_a_header_with_flipped_bytes_tells_no_wrong_size(tmp_path):
    rng, told, path = np.random.default_rng(0), 0, tmp_path / "image.jpg"
    for orientation in (1, 6):
        data = np.frombuffer(with_exif(FILES["baseline.jpg"], orientation, THUMBNAIL), np.uint8)
        header = data.tobytes().rindex(b"\xff\xda") + 14
        for _ in range(400):
            broken = data.copy()
            broken[rng.integers(2, header, 2)] = rng.integers(0, 256, 2)
            path.write_bytes(broken.tobytes())
            try:
                file = ImageFile(path)
                whole = file.decode()
            except ImageError:
                continue
            if file.size is not None:
                told += 1
                assert file.size == whole.shape[:2]
                rows = file.decode_rows(20)
                assert np.array_equal(rows, whole[: len(rows)])
    assert told > 400


# ------------------------------------------------------------------------------------------------ refused


def test_what_is_no_image_is_refused_by_name(tmp_path, capfd):
    (tmp_path / "folder.jpg").mkdir()
    assert "no such file" in refusal(tmp_path / "missing.jpg")
    assert "a folder" in refusal(tmp_path / "folder.jpg")
    assert "empty" in refusal(written(tmp_path, b""))
    assert "cannot be read" in refusal(written(tmp_path, b"x", "file") + "/below.jpg")
    with pytest.raises(ImageError, match=r"^'a\\x00b': a zero byte, which no file's name can hold$"):
        decode("a\0b")
    for data in (b"not an image at all", b"\x89PNG", b"\xff\xd8", b"GIF89a", bytes(1000)):
        assert "not a JPEG, PNG, BMP, WebP or TIFF image" in refusal(written(tmp_path, data))
    assert capfd.readouterr() == ("", "")


def cuts(length: int) -> list[int]:
    """Lengths to cut a file to: spread over it, and every one of the last bytes."""
    return sorted({*np.linspace(3, length - 13, 60).astype(int).tolist(), *range(length - 12, length)})


@pytest.mark.parametrize("kind", JPEG)
def test_a_truncated_jpeg_is_refused(tmp_path, capfd, kind):
    for data in (FILES[f"{kind}.jpg"], with_exif(FILES[f"{kind}.jpg"], 6, THUMBNAIL)):
        for length in cuts(len(data)):
            assert "truncated" in refusal(written(tmp_path, data[:length])), length
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", JPEG)
def test_a_jpeg_cut_behind_its_thumbnail_is_refused(tmp_path, kind):
    data = with_exif(FILES[f"{kind}.jpg"], 1, THUMBNAIL)
    end = data.index(THUMBNAIL) + len(THUMBNAIL)
    assert data[:end].endswith(END)
    for length in (end - 1, end, end + 1):
        assert "truncated" in refusal(written(tmp_path, data[:length]))


def test_an_end_marker_inside_a_segment_between_scans_is_not_the_end(tmp_path):
    data = FILES["progressive.jpg"]
    second_scan = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    table = data.rindex(b"\xff\xc4", 0, second_scan)  # the Huffman table that comes with it
    commented = data[:table] + segment(0xFE, b"a" + END + b"b") + data[table:]
    assert np.array_equal(decode(written(tmp_path, commented)), decode(written(tmp_path, data)))
    assert "truncated" in refusal(written(tmp_path, commented[: commented.index(b"a" + END) + 3]))


def test_a_jpeg_cut_inside_the_header_of_its_scan_is_refused(tmp_path):
    data = FILES["baseline.jpg"]
    scan = data.index(b"\xff\xda")
    assert "truncated" in refusal(written(tmp_path, data[: scan + 5] + END))


@pytest.mark.parametrize("following", [picture(), picture(400, 500)])
def test_a_progressive_jpeg_that_runs_into_another_image_is_refused(tmp_path, following):
    data = FILES["progressive.jpg"]
    for length in (len(data) - 40, len(data) - 2):  # inside its last scan
        message = refusal(written(tmp_path, data[:length] + encoded(following, ".jpg")))
        assert "truncated" in message


@pytest.mark.parametrize("name", ["colour.png", "grey.png", "alpha.png", "grey16.png"])
def test_a_truncated_png_is_refused(tmp_path, capfd, name):
    for length in cuts(len(FILES[name]))[3:]:  # shorter than its signature it is no PNG
        message = refusal(written(tmp_path, FILES[name][:length]))
        assert "truncated" in message or length < 8
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["colour.bmp", "colour.webp", "colour.tiff"])
def test_other_formats_are_refused_when_cut(tmp_path, capfd, name):
    for fraction in (0.3, 0.6, 0.95):
        refusal(written(tmp_path, FILES[name][: int(fraction * len(FILES[name]))]))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [*FILES, "turned.jpg"])
def test_the_cap_on_pixels_is_exact_and_comes_before_decoding(monkeypatch, name):
    data = with_exif(FILES["baseline.jpg"], 6) if name == "turned.jpg" else FILES[name]
    assert decode("x", data, max_pixels=61 * 87).size == 3 * 61 * 87
    monkeypatch.setattr(cv2, "imdecode", None)
    monkeypatch.setattr(image_module, "simplejpeg", None)
    with pytest.raises(ImageError, match=r"^x: 87 x 61 pixels, more than 5306 \(mend: make it smaller\)$"):
        decode("x", data, max_pixels=61 * 87 - 1)


def test_the_default_cap_lets_48_megapixels_pass():
    assert ImageFile("x", flat_jpeg(8000, 6000)).size == (6000, 8000)
    ImageFile("x", flat_jpeg(8192, 8192))
    with pytest.raises(ImageError, match=r"8192 x 8193 pixels, more than 67108864"):
        ImageFile("x", flat_jpeg(8192, 8193))


def test_of_two_orientations_opencv_chooses():
    for first, second in ((6, 1), (1, 6), (3, 8)):
        data = with_exif(with_exif(FILES["baseline.jpg"], second), first)
        file = ImageFile("x", data)
        assert file.size is None
        assert np.array_equal(file.decode(), cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))


@pytest.mark.parametrize("oddity", ["two orientations", "marker without a length", "unreadable orientation"])
def test_odd_headers_are_bounded_too(oddity):
    odd = {
        "two orientations": exif(6) + exif(1),
        # What a length would be read from hides the frame header from a careless reader.
        "marker without a length": b"\xff\x01\x00\xff",
        "unreadable orientation": segment(0xE1, b"Exif\0\0??"),
    }[oddity]
    data = flat_jpeg(60_000, 60_000)[:400].replace(b"\xff\xd8", b"\xff\xd8" + odd, 1) + bytes(99) + END
    with pytest.raises(ImageError, match="60000 x 60000 pixels"):
        ImageFile("x", data)


@pytest.mark.parametrize("name", ["baseline.jpg", "colour.png", "colour.webp", "colour.tiff", "colour.bmp"])
@pytest.mark.parametrize("shape", [(61, 88, 3), (12, 16, 3)])
def test_another_size_than_announced_is_refused(monkeypatch, name, shape):
    monkeypatch.setattr(image_module, "simplejpeg", None)
    monkeypatch.setattr(cv2, "imdecode", lambda data, flag: np.zeros(shape, np.uint8))
    with pytest.raises(ImageError, match=rf"87 x 61 pixels by its header, {shape[1]} x {shape[0]} decoded"):
        decode("x", FILES[name])


def test_a_warning_before_an_error_leaves_no_memory_as_pixels():
    """libjpeg finds the scan's parameters odd, goes on, and finds a Huffman table that cannot be."""
    data = bytearray(FILES["baseline.jpg"])
    scan, table = data.index(b"\xff\xda"), data.index(b"\xff\xc4")
    data[scan + 12] = 77
    data[table + 5 : table + 21] = b"\xff" * 16
    file = ImageFile("x", bytes(data))
    for rows in (file.decode, lambda: file.decode_rows(20)):
        with pytest.raises(ImageError, match=r"^x: truncated or damaged JPEG"):
            rows()


@pytest.mark.parametrize("kind", ["baseline", "progressive", "restarts"])
def test_compressed_data_that_end_early_are_damaged(capfd, kind):
    data = FILES[f"{kind}.jpg"]
    for length in (0.5, 0.7, 0.9):
        with pytest.raises(ImageError, match=r"^x: (truncated or )?damaged JPEG \("):
            decode("x", with_exif(data[: int(length * len(data))] + END, 6))
    assert capfd.readouterr() == ("", "")


def test_sizes_that_cannot_be_are_refused(tmp_path):
    for width, height in ((0, 5), (5, 0), (60000, 60000)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))
        refusal(written(tmp_path, data + chunk(b"IEND", b"")))


# ------------------------------------------------------------------------------------------------ goldens


def test_goldens_of_the_published_code(shared):
    folder = shared / "goldens"
    for name, golden in json.loads((folder / "golden" / "decode.json").read_text())["images"].items():
        path = folder / "images" / name
        if golden.get("shape") is None or name.endswith("truncated.jpg"):
            refusal(path)
        else:
            image = decode(path)
            assert list(image.shape) == golden["shape"], name
            assert hashlib.sha256(image.tobytes()).hexdigest() == golden["bgr_sha256"], name


def test_real_photographs_by_rows_and_reduced(shared):
    for path in sorted(shared.glob("distractors/**/*.jpg"))[::12]:
        file = ImageFile(path)
        whole = file.decode()
        assert file.size == whole.shape[:2], path
        for end in (1, 133, 264):
            rows = file.decode_rows(end)
            assert len(rows) >= end
            assert np.array_equal(rows, whole[: len(rows)]), path


def test_real_photographs_equal_imread_and_are_refused_when_cut(shared, tmp_path):
    paths = sorted(shared.glob("distractors/**/*.jpg"))
    assert paths
    for path in paths[::12]:
        assert np.array_equal(decode(path), cv2.imread(str(path))), path
        data = path.read_bytes()
        for fraction in (0.1, 0.5, 0.99):
            assert "truncated" in refusal(written(tmp_path, data[: int(fraction * len(data))]))
