"""Files that a folder of photographs may hold and should not, and what has to come of each.

`kinds()` gives them; nothing large is kept in memory, and what is large when decoded is marked `heavy`.
"""

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

END = b"\xff\xd9"


@dataclass(frozen=True)
class Kind:
    """One file: how it is made; why it is refused (a pattern, without the path) or else the pixels it stands for."""

    name: str
    write: Callable[[Path], None]
    refused: str | None = None
    pixels: np.ndarray | None = None  # uint8 [H, W, 3] BGR
    heavy: bool = False  # tens of megapixels when decoded


def write_all(folder: Path, *, heavy: bool = True) -> list[Kind]:
    """Write every kind that can be made here into `folder`."""
    made = [kind for kind in kinds() if heavy or not kind.heavy]
    for kind in made:
        kind.write(folder / kind.name)
    return made


def kinds() -> list[Kind]:
    return [*_jpegs(), *_pngs(), *_bmps(), *_webps(), *_tiffs(), *_not_images(), *_special_files()]


# ------------------------------------------------------------------------------------------------ building blocks


def picture(height: int = 61, width: int = 87) -> np.ndarray:
    """Smooth shapes and noise: uint8 [height, width, 3]."""
    rng = np.random.default_rng(11)
    y, x = np.mgrid[:height, :width]
    smooth = 120 + 80 * np.sin(np.stack([x / (5 + c) + y / (9 - c) for c in range(3)], axis=2))
    return np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8)


def flat(height: int, width: int, value: int) -> np.ndarray:
    """One colour, without taking memory."""
    return np.broadcast_to(np.uint8(value), (height, width, 3))


def encoded(image: np.ndarray, extension: str, *parameters: int) -> bytes:
    done, data = cv2.imencode(extension, image, list(parameters))
    assert done
    return data.tobytes()


def bgr(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def exif(orientation: int, thumbnail: bytes = b"") -> bytes:
    """An APP1 segment: a first directory with the orientation, a second that points to the thumbnail."""
    first = struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 26)
    second = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail), 0)
    return segment(0xE1, b"Exif\0\0" + b"II*\0\x08\0\0\0" + first + second + thumbnail)


def flat_jpeg(width: int, height: int, *, components: int = 1, scans: int = 0) -> bytes:
    """Grey 128 everywhere, made without an encoder: every code is the bit 0, so that all its data are zero bytes.

    With `scans` it is progressive, and so many scans refine nothing.
    """
    blocks = -(-width // 8) * -(-height // 8)
    frame = struct.pack(">BHHB", 8, height, width, components) + b"".join(
        bytes([1 + c, 0x11, 0]) for c in range(components)
    )
    dc = segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00")  # the code 0: no difference
    ac = segment(0xC4, b"\x10\x01" + bytes(15) + (b"\xe0" if scans else b"\x00"))  # 0: end of 16,384 blocks, of one
    data = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2 if scans else 0xC0, frame) + dc + ac
    everything = bytes([components]) + b"".join(bytes([1 + c, 0]) for c in range(components))
    if not scans:
        return data + segment(0xDA, everything + bytes([0, 63, 0])) + bytes(-(-blocks * components // 4)) + END
    first = segment(0xDA, everything + bytes([0, 0, 0])) + bytes(-(-blocks * components // 8))
    ends = bytes(-(-15 * -(-blocks // 16384) // 8))  # each code is followed by 14 bits
    refinement = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + ends
    return data + first + refinement * (scans - 1) + END


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png(width: int, height: int, idat: bytes, *, depth: int = 8, colour: int = 2, before: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def zeros(length: int) -> bytes:
    """`zlib.compress(bytes(length))`, at no cost: one compressed block is repeated."""
    deflate = zlib.compressobj(9, wbits=-15)
    block = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, wbits=-15)
    tail = last.compress(bytes(length % 2**20)) + last.flush()
    checksum = (length % 65521) << 16 | 1
    return b"\x78\xda" + block * (length // 2**20) + tail + struct.pack(">I", checksum)


Tags = dict[int, list[int]]


def tiff(width: int, height: int, strips: list[bytes], *, rows: int, changed: Tags | None = None) -> bytes:
    """RGB of 8 bits and uncompressed, but for the tags that are `changed` or added."""
    starts = np.cumsum([8, *(len(strip) for strip in strips)]).tolist()
    tags = {256: [width], 257: [height], 258: [8] * 3, 259: [1], 262: [2], 273: starts[:-1], 277: [3], 278: [rows]}
    tags = dict(sorted({**tags, 279: [len(strip) for strip in strips], **(changed or {})}.items()))
    entries, values, end = b"", b"", starts[-1] + 2 + 12 * len(tags) + 4
    for tag, numbers in tags.items():
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        at = packed if len(packed) == 4 else struct.pack("<I", end + len(values))
        values += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + at
    directory = struct.pack("<H", len(tags)) + entries + bytes(4) + values
    return b"II*\0" + struct.pack("<I", starts[-1]) + b"".join(strips) + directory


def _file(name: str, data: bytes, refused: str | None = None, pixels: np.ndarray | None = None, **more) -> Kind:
    return Kind(name, lambda path: path.write_bytes(data) and None, refused, pixels, **more)


# ------------------------------------------------------------------------------------------------ images


def _jpegs() -> list[Kind]:
    plain, progressive = encoded(picture(), ".jpg"), encoded(picture(), ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    pixels, thumbnail, small = bgr(plain), encoded(picture(12, 16), ".jpg"), flat_jpeg(16, 16)
    frame, scan = plain.index(b"\xff\xc0"), plain.index(b"\xff\xda")
    with_thumbnail = plain[:2] + exif(6, thumbnail) + plain[2:]
    cuts = [
        _file(f"cut-{where}.jpg", data[:length], "truncated")
        for where, data, length in (
            *(("in-first-bytes", plain, 3), ("in-tables", plain, frame - 9), ("in-frame", plain, frame + 6)),
            *(("behind-header", plain, scan), ("in-scan-header", plain, scan + 5), ("at-half", plain, len(plain) // 2)),
            *(("before-end", plain, len(plain) - 2), ("by-one-byte", plain, len(plain) - 1)),
            *(("at-half-progressive", progressive, len(progressive) // 2), ("late-progressive", progressive, -3)),
            ("behind-thumbnail", with_thumbnail, with_thumbnail.index(thumbnail) + len(thumbnail)),
        )
    ]
    cmyk = flat_jpeg(240, 160, components=4)
    inside = len(cmyk) - 300
    taller = plain[: frame + 5] + struct.pack(">H", 200) + plain[frame + 7 :]
    flatter = plain[: frame + 5] + struct.pack(">H", 20) + plain[frame + 7 :]
    return [
        *cuts,
        _file("cut-and-ended.jpg", plain[: len(plain) // 2] + END, "damaged JPEG .*premature end"),
        _file("zeros-inside.jpg", plain[:1500] + bytes(len(plain) - 2000) + plain[-500:], "damaged JPEG"),
        _file("taller-than-its-data.jpg", taller, "damaged JPEG .*premature end"),
        _file("flatter-than-its-data.jpg", flatter, "damaged JPEG .*extraneous"),
        _file("two-frame-headers.jpg", plain[:frame] + plain[frame : frame + 19] + plain[frame:], "two frame headers"),
        _file("no-frame-header.jpg", plain[:frame] + plain[frame + 19 :], "no frame header"),
        _file("no-scan.jpg", plain[:scan] + END, "no image in it"),
        _file("no-height.jpg", plain[: frame + 5] + b"\0\0" + plain[frame + 7 :], "without pixels"),
        _file("12-bits.jpg", plain[: frame + 4] + b"\x0c" + plain[frame + 5 :], "truncated or damaged JPEG"),
        _file("unknown-process.jpg", plain[: frame + 1] + b"\xcf" + plain[frame + 2 :], "truncated or damaged JPEG"),
        _file("many-segments.jpg", plain[:2] + segment(0xFE, b"") * 20_000 + plain[2:], "more than 10000 segments"),
        _file("many-scans.jpg", flat_jpeg(64, 64, scans=1001), "64 x 64 pixels in 1001 scans"),
        _file("many-large-scans.jpg", flat_jpeg(8192, 8192, scans=65), "8192 x 8192 pixels in 65 scans"),
        _file("announces-60000.jpg", small.replace(b"\0\x10\0\x10", b"\xea\x60" * 2), "60000 x 60000 pixels"),
        _file("two-rows-too-wide.jpg", flat_jpeg(65_501, 2), "65501 x 2 pixels, more than 65500 a side"),
        _file("one-column.jpg", flat_jpeg(1, 65_000), pixels=flat(65_000, 1, 128)),
        _file("1000-scans.jpg", flat_jpeg(2000, 2000, components=3, scans=1000), pixels=flat(2000, 2000, 128)),
        _file("8000x6000.jpg", flat_jpeg(8000, 6000), pixels=flat(6000, 8000, 128), heavy=True),
        _file(
            "largest-progressive-64-scans.jpg",
            flat_jpeg(8192, 8192, components=3, scans=64),
            pixels=flat(8192, 8192, 128),
            heavy=True,
        ),
        _file("cmyk.jpg", flat_jpeg(24, 16, components=4), pixels=flat(16, 24, 65)),  # 128 - ((255 - 128) * 128 >> 8)
        _file("unknown-marker-inside.jpg", cmyk[:inside] + b"\xff\x08" + cmyk[inside:], "damaged JPEG"),
        _file("second-scan-inside.jpg", cmyk[:inside] + cmyk[cmyk.index(b"\xff\xda") :], "damaged JPEG"),
        _file("turned-with-thumbnail.jpg", with_thumbnail, pixels=np.rot90(pixels, -1)),
        _file("orientation-99.jpg", plain[:2] + exif(99) + plain[2:], pixels=pixels),
        _file("trailing-garbage.jpg", plain + b"\xff\xd8\xff written by a camera", pixels=pixels),
        _file("two-images.jpg", plain + thumbnail, pixels=pixels),
        _file("two-images-first-cut.jpg", progressive[:-2] + thumbnail, "truncated"),
        _file("few-bytes-too-many.jpg", plain[:-2] + b"abc" + END, pixels=pixels),
        _file("jpeg-by-another-name.png", plain, pixels=pixels),
        _file("jpeg-without-extension", plain, pixels=pixels),
    ]


def _pngs() -> list[Kind]:
    image = picture()
    plain = encoded(image, ".png")
    idat = zlib.compress(b"".join(b"\0" + row[:, ::-1].tobytes() for row in image))
    height, width = image.shape[:2]
    bomb = zlib.compress(bytes(50_000_000))
    middle = len(plain) // 2
    chunks = chunk(b"tEXt", b"") * 100_001
    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
    first_colours = np.array([[[30, 20, 10], [60, 50, 40], [0, 0, 0], [0, 0, 0]]], np.uint8)
    frames = chunk(b"acTL", struct.pack(">II", 2, 0))
    sixteen = np.arange(0, 65536, 16, dtype=">u2").reshape(64, 64)
    sixteen_rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in sixteen))
    alpha = np.dstack([image[..., ::-1], np.zeros((height, width), np.uint8)])
    turned = png(width, height, idat, before=chunk(b"eXIf", exif(6)[10:]))
    misnamed = {name: turned.replace(b"eXIf", name) for name in (b"eXIg", b"dXIf", b"exIf", b"eXif")}
    alpha_rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in alpha))
    return [
        *(_file(f"cut-at-{share}.png", plain[: int(share * len(plain))], "truncated") for share in (0.001, 0.5, 0.999)),
        _file("signature-only.png", plain[:8], "truncated or damaged PNG"),
        _file("flipped-bit.png", plain[:middle] + bytes([plain[middle] ^ 1]) + plain[middle + 1 :], "wrong checksum"),
        _file("damaged-data.png", png(width, height, idat[:200] + bytes(99) + idat[299:]), "its compressed data"),
        _file("wrong-sum.png", png(width, height, idat[:-1] + bytes([idat[-1] ^ 1])), "its compressed data"),
        _file("too-few-pixels.png", png(width, height + 1, idat), "fewer pixels than its header"),
        _file("too-many-pixels.png", png(width, height - 1, idat), "more pixels than its header"),
        _file("unknown-filter.png", png(4, 1, zlib.compress(b"\x05" + bytes(12))), "unknown filter"),
        _file("no-data.png", png(4, 1, b"").replace(chunk(b"IDAT", b""), b""), "its chunks are not"),
        _file("no-palette.png", png(4, 1, zlib.compress(bytes(5)), colour=3), "its chunks are not"),
        _file("impossible-header.png", png(4, 1, zlib.compress(bytes(5)), colour=5), "impossible header"),
        _file("no-width.png", png(0, 1, zlib.compress(b"\0")), "without pixels"),
        _file("unknown-critical-chunk.png", png(width, height, idat, before=chunk(b"ABCD", b"")), "its chunks are not"),
        *(
            _file(f"orientation-called-{name.decode()}.png", data, "wrong checksum of its")
            for name, data in misnamed.items()
        ),
        *(
            _file(f"chunk-with-{what}.png", png(width, height, idat, before=chunk(name, b"")), "no chunk is called")
            for what, name in (("reserved-bit", b"eXif"), ("zero-in-its-name", b"a\0Bc"), ("no-letter", b"a&Bc"))
        ),
        _file(
            "text-between-data.png", plain[:-12] + chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", b"") + plain[-12:], "apart"
        ),
        _file("turned.png", turned, pixels=np.rot90(image, -1)),
        _file("many-chunks.png", png(width, height, idat, before=chunks), "more than 100000 chunks"),
        _file("announces-60000.png", png(60_000, 60_000, zlib.compress(bytes(999))), "60000 x 60000 pixels"),
        _file("bomb-20000.png", png(20_000, 20_000, zeros(20_000 * 60_001)), "20000 x 20000 pixels, more than 67"),
        _file("inflates-to-a-gigabyte.png", png(16, 16, zeros(10**9)), "more pixels than its header"),
        _file(
            "largest-of-16-bits-and-alpha.png",
            png(8192, 8192, zeros(8192 * 65_537), depth=16, colour=6),
            "536879104 bytes when decompressed",
        ),
        _file("one-row-too-wide.png", png(70_000, 1, zeros(210_001)), "70000 x 1 pixels, more than 65500 a side"),
        _file("one-column.png", png(1, 65_000, zeros(4 * 65_000)), pixels=flat(65_000, 1, 0)),
        _file("largest.png", png(8192, 8192, zeros(8192 * 24_577)), pixels=flat(8192, 8192, 0), heavy=True),
        *(
            _file(f"bomb-in-{name}.png", png(width, height, idat, before=before), pixels=image)
            for name, before in (
                ("profile", chunk(b"iCCP", b"a\0\0" + bomb)),
                ("text", chunk(b"zTXt", b"a\0\0" + bomb)),
                ("unicode-text", chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)),
            )
        ),
        _file("png-by-another-name.jpg", plain + b"more", pixels=image),
        _file(
            "short-palette.png",
            png(4, 1, zlib.compress(b"\0\0\1\2\xff"), colour=3, before=palette),
            pixels=first_colours,
        ),
        _file(
            "long-palette.png",
            png(4, 1, zlib.compress(b"\0\x01\x01"), depth=4, colour=3, before=chunk(b"PLTE", bytes(range(201)))),
            pixels=np.array([[[2, 1, 0], [5, 4, 3]] * 2], np.uint8),
        ),
        _file("odd-palette.png", png(4, 1, zlib.compress(bytes(5)), colour=3, before=chunk(b"PLTE", b"ab")), "palette"),
        _file("animated.png", png(width, height, idat, before=frames), pixels=image),
        _file(
            "sixteen-bits.png",
            png(64, 64, sixteen_rows, depth=16, colour=0),
            pixels=np.repeat((sixteen // 256).astype(np.uint8)[..., None], 3, axis=2),
        ),
        _file("transparent.png", png(width, height, alpha_rows, colour=6), pixels=image),
        _file(
            "one-bit.png",
            png(8, 1, zlib.compress(b"\0\xa5"), depth=1, colour=0),
            pixels=np.repeat(np.array([[[255], [0], [255], [0], [0], [255], [0], [255]]], np.uint8), 3, axis=2),
        ),
    ]


def _bmps() -> list[Kind]:
    image = picture()
    plain = encoded(image, ".bmp")

    def sized(width: int, height: int) -> bytes:
        return plain[:18] + struct.pack("<ii", width, height) + plain[26:]

    return [
        _file("cut-at-half.bmp", plain[: len(plain) // 2], "truncated BMP"),
        _file("header-only.bmp", plain[:54], "truncated BMP"),
        _file("two-bytes.bmp", b"BM", "BMP of 0 bits"),
        _file("announces-60000.bmp", sized(60_000, 60_000), "truncated BMP"),
        _file("negative-width.bmp", sized(-87, 61), "truncated BMP"),
        _file("no-height.bmp", sized(87, 0), "without pixels"),
        _file("run-lengths.bmp", plain[:28] + struct.pack("<HI", 8, 1) + plain[34:], "compression 1, not supported"),
        _file("from-the-top.bmp", sized(87, -61), pixels=image[::-1]),
        _file("bmp-by-another-name.jpg", plain, pixels=image),
    ]


def _webps() -> list[Kind]:
    lossless = encoded(picture(), ".webp", cv2.IMWRITE_WEBP_QUALITY, 101)
    lossy = encoded(picture(), ".webp", cv2.IMWRITE_WEBP_QUALITY, 80)
    sides = struct.pack("<HH", 87, 61)

    def extended(flags: int, width: int, height: int) -> bytes:
        payload = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + payload

    return [
        *(_file(f"cut-at-{share}.webp", lossy[: int(share * len(lossy))], "truncated") for share in (0.01, 0.5, 0.99)),
        _file("announces-16383.webp", lossy.replace(sides, b"\xff\x3f" * 2), "16383 x 16383 pixels"),
        _file("announces-60000.webp", extended(0, 60_000, 60_000), "60000 x 60000 pixels"),
        _file("animated.webp", extended(2, 87, 61), "animated WebP"),
        _file("no-frame.webp", extended(0, 87, 61), "truncated or damaged WebP"),
        _file("unknown-chunk.webp", lossy[:12] + b"ABCD" + lossy[16:], "damaged WebP"),
        _file("webp-by-another-name.jpg", lossless, pixels=picture()),
    ]


def _tiffs() -> list[Kind]:
    image = picture(60, 80)
    rgb = image[..., ::-1]
    strips = [rgb[y : y + 20].tobytes() for y in (0, 20, 40)]
    deflated = [zlib.compress(strip) for strip in strips]
    cut_deflated = [deflated[0], deflated[1][:300], deflated[2]]
    plain = tiff(80, 60, strips, rows=20)

    def changed(tags: Tags, parts: list[bytes] = strips) -> bytes:
        return tiff(80, 60, parts, rows=20, changed=tags)

    two_pages = bytearray(plain)
    following = plain.rindex(bytes(4), 0, plain.rindex(struct.pack("<3I", 8, 8, 8)))  # the place of the next page
    second = struct.pack("<H", 2) + b"".join(struct.pack("<HHII", tag, 4, 1, 5) for tag in (256, 257)) + bytes(4)
    two_pages[following : following + 4] = struct.pack("<I", len(plain))
    largest = tiff(8192, 8192, [zeros(8192 * 8192 * 3)], rows=8192, changed={259: [8]})
    tile = zeros(8192 * 8192 * 3)
    deep = {258: [16] * 4, 259: [8], 277: [4], 338: [2]}

    def tiled(width: int, height: int, tiles: int, *, apart: bool = False) -> bytes:
        """Tiles of 8192 x 8192 pixels that share one compressed stream; `apart`: each has a copy."""
        starts = [8 + apart * number * len(tile) for number in range(tiles)]
        tags = {259: [8], 322: [8192], 323: [8192], 324: starts, 325: [len(tile)] * tiles}
        return tiff(width, height, [tile] * (tiles if apart else 1), rows=1, changed=tags)

    return [
        _file("cut-at-half.tif", plain[: len(plain) // 2], "truncated TIFF"),
        _file("cut-in-directory.tif", plain[:-150], "truncated TIFF"),
        _file("eight-bytes.tif", plain[:8], "truncated TIFF"),
        _file("directory-in-header.tif", b"II*\0\1\0\0\0" + bytes(99), "truncated TIFF"),
        _file("strip-beyond-the-end.tif", changed({273: [8, 4808, 10**9]}), "truncated TIFF"),
        _file("short-strip.tif", changed({279: [4800, 100, 4800]}), "does not hold its pixels"),
        _file("missing-strip.tif", changed({273: [8, 4808], 279: [4800, 4800]}), "damaged TIFF"),
        _file("damaged-deflate.tif", changed({259: [8]}, cut_deflated), "strip or tile 1"),
        _file("announces-60000.tif", tiff(60_000, 60_000, strips, rows=20), "60000 x 60000 pixels"),
        _file("two-million-strips.tif", plain.replace(b"\x11\1\4\0\3\0\0\0", b"\x11\1\4\0\0\0\x20\0"), "tag 273"),
        _file(
            "huge-tile.tif",
            changed({322: [2**31], 323: [2**31], 324: [8], 325: [100]}),
            "pieces of no or more than 201326592 bytes",
        ),
        _file("bits-without-number.tif", changed({258: list(range(9000))}), "^a TIFF with .{40,100}, not supported"),
        _file("float.tif", changed({258: [32] * 3, 339: [3] * 3}), "32 bits, format 3, .*not supported"),
        _file("signed.tif", changed({339: [2] * 3}), "8 bits, format 2, .*not supported"),
        _file("lab.tif", changed({262: [8]}), "colour space 8, not supported"),
        _file("compressed-by-jbig.tif", changed({259: [34661]}), "compression 34661, not supported"),
        _file("begins-with-a-thumbnail.tif", changed({254: [1]}), "begins with a thumbnail"),
        _file("big.tif", b"II\x2b\0" + plain[4:], "a BigTIFF file, not a JPEG"),
        _file("more-tiles-than-needed.tif", tiled(64, 64, 100), "100 strips or tiles, where its size needs 1"),
        _file("tiles-in-one-place.tif", tiled(1, 65_000, 8), "its strips or tiles overlap"),
        _file("one-column-of-tiles.tif", tiled(1, 65_000, 8, apart=True), "1610612736 bytes when decompressed"),
        _file("flatter-than-its-strips.tif", changed({257: [30]}), "3 strips or tiles, where its size needs 2"),
        _file(
            "largest-of-16-bits-and-alpha.tif",
            tiff(8192, 8192, [zeros(8192 * 1024 * 8)] * 8, rows=1024, changed=deep),
            "536870912 bytes when decompressed",
        ),
        _file("two-pages.tif", bytes(two_pages) + second, pixels=image),
        _file("deflated.tif", changed({259: [8]}, deflated), pixels=image),
        _file("turned.tif", changed({274: [6]}), pixels=np.rot90(image, -1)),
        _file("tiff-by-another-name.jpg", plain, pixels=image),
        _file("largest-in-one-strip.tif", largest, pixels=flat(8192, 8192, 0), heavy=True),
    ]


# ------------------------------------------------------------------------------------------------ no images


def _not_images() -> list[Kind]:
    heif = b"\0\0\0\x18ftyp%b\0\0\0\0mif1"
    contents = {
        "empty.jpg": (b"", "the file is empty"),
        "zero-bytes.jpg": (bytes(5000), "nothing but zero bytes, not a JPEG"),
        "one-byte.jpg": (b"\xff", "^not a JPEG, PNG, BMP, WebP or TIFF image"),
        "noise.jpg": (np.random.default_rng(3).bytes(5000), "^not a JPEG, PNG, BMP, WebP or TIFF image"),
        "error-page.jpg": (b"\n<!DOCTYPE HTML><html><body>404</body></html>", "an HTML page, not a JPEG"),
        "message.jpg": (b'{"error": "rate limit exceeded"}\n', "a text, not a JPEG"),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer file"),
        "drawing.svg": (b'<?xml version="1.0"?>\n<svg width="9" height="9"/>', "an SVG file"),
        "animation.gif": (encoded(picture(9, 9), ".gif"), "a GIF file, not a JPEG, PNG, BMP, WebP or TIFF image"),
        "gif.jpg": (b"GIF89a" + bytes(50), "a GIF file"),
        "photo.heic": (heif % b"heic", "a HEIC file"),
        "photo.avif": (heif % b"avif", "an AVIF file"),
        "film.jpg": (heif % b"isom", "an MP4 or similar file"),
        "photo.jp2": (encoded(picture(), ".jp2"), "a JPEG 2000 file"),
        "photo.jxl": (b"\xff\x0a" + bytes(50), "a JPEG XL file"),
        "photo.exr": (b"\x76\x2f\x31\x01" + bytes(50), "an OpenEXR file"),
        "photo.hdr": (encoded(picture().astype(np.float32), ".hdr"), "a Radiance HDR file"),
        "photo.ppm": (encoded(picture(), ".ppm"), "a portable anymap"),
        "photo.psd": (b"8BPS" + bytes(50), "a Photoshop file"),
        "icon.png": (b"\0\0\1\0\1\0" + bytes(16) + encoded(picture(9, 9), ".png"), "an icon"),
        "document.jpg": (b"%PDF-1.7\n", "a PDF file"),
        "archive.jpg": (b"PK\3\4" + bytes(50), "a zip archive"),
        "vectors.jpg": (b"\x93NUMPY" + bytes(50), "a NumPy array"),
    }
    return [_file(name, data, refused) for name, (data, refused) in contents.items()]


def _special_files() -> list[Kind]:
    def unreadable(path: Path) -> None:
        path.write_bytes(encoded(picture(), ".jpg"))
        path.chmod(0)

    def sparse(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(2**28 + 1)

    kinds = [
        Kind("folder.jpg", lambda path: path.mkdir(), "a folder, not an image file"),
        Kind("dangling-link.jpg", lambda path: path.symlink_to("nowhere.jpg"), "no such file"),
        Kind("link-to-itself.jpg", lambda path: path.symlink_to(path.name), "cannot be read"),
        Kind("pipe.jpg", os.mkfifo, "not a regular file"),
        Kind("endless-device.jpg", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        Kind("too-many-bytes.jpg", sparse, "268435457 bytes, more than 268435456"),
    ]
    if os.geteuid() != 0:  # root may read everything
        kinds.append(Kind("unreadable.jpg", unreadable, "cannot be read"))
    return kinds
