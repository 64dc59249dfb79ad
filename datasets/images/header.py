"""What the first bytes of a file tell about an image, before anything is decoded: its format and its size.

Only what limits memory and time is read here; whether the rest is in order is OpenCV's to say. JPEG, PNG and TIFF have
files of their own. Own code rather than a library's, since it must see what OpenCV's decoders will see: 10 lines each.
"""

from typing import NamedTuple

from datasets.errors import DataError

FORMATS = "JPEG, PNG, BMP, WebP or TIFF"
# Of pixels in a PNG or TIFF when decompressed, which takes 4 s: 8192 x 8192 of three 16-bit channels, and filters.
MOST_DECOMPRESSED = 3 * 2**27 + 2**17


class ImageError(DataError):
    """A file that is not a complete, readable image; the message is one line: path and reason."""


class Size(NamedTuple):
    """Sides in pixels as they are stored: an EXIF orientation may exchange them."""

    height: int
    width: int


def check_decompressed(total: int) -> None:
    if total > MOST_DECOMPRESSED:
        raise ImageError(f"{total} bytes when decompressed, more than {MOST_DECOMPRESSED} (mend: make it smaller)")


# What people have under the name of a photograph: first bytes, and what to call it.
_OTHERS = (
    (b"GIF8", "a GIF"),
    (b"II\x2b\0", "a BigTIFF"),
    (b"MM\0\x2b", "a BigTIFF"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (b"\x76\x2f\x31\x01", "an OpenEXR"),
    (b"#?RADIANCE", "a Radiance HDR"),
    (b"#?RGBE", "a Radiance HDR"),
    (b"8BPS", "a Photoshop"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\x59\xa6\x6a\x95", "a Sun raster"),
    (b"%PDF", "a PDF"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"version https://git-lfs", "a Git LFS pointer"),
    *((b"P" + kind, "a portable anymap (PNM)") for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"f", b"F")),
)
_BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF", **dict.fromkeys((b"heic", b"heix", b"mif1", b"msf1"), "a HEIC")}


def format_of(data: bytes) -> str:
    """One of FORMATS, by content. Raises ImageError, which names other kinds of files where they are known."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"BM"):
        return "BMP"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    raise ImageError(f"{_other(data)}not a {FORMATS} image")


def _other(data: bytes) -> str:
    for start, name in _OTHERS:
        if data.startswith(start):
            return f"{name} file, "
    if data[4:8] == b"ftyp":
        return f"{_BRANDS.get(data[8:12], 'an MP4 or similar')} file, "
    text = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, "
    if text.startswith((b"<?xml", b"<svg")):
        return "an SVG file, " if b"<svg" in text else "an XML file, "
    if not data.strip(b"\0"):
        return "nothing but zero bytes, "
    return "a text, " if text and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text) else ""


def read_bmp(data: bytes) -> Size:
    """Raises ImageError for one that is cut off, or of a kind that no photograph has."""
    header = int.from_bytes(data[14:18], "little")
    if header == 12:
        (width, height), (bits,), compression = _numbers(data, 18, 2, 2), _numbers(data, 24, 2, 1), 0
    else:
        (width, height), (bits,), (compression,) = (_numbers(data, *at) for at in ((18, 4, 2), (28, 2, 1), (30, 4, 1)))
        height = 2**32 - height if height >= 2**31 else height  # negative: stored from top to bottom
    # 3: the bits of each colour are told. OpenCV takes what is usual for granted
    usual = compression == 3 and bits == 32 and _numbers(data, 54, 4, 3) == [0xFF0000, 0xFF00, 0xFF]
    if not usual and (compression != 0 or bits not in (1, 4, 8, 24, 32)):
        raise ImageError(f"a BMP of {bits} bits with compression {compression}, not supported (mend: save it as PNG)")
    if len(data) - int.from_bytes(data[10:14], "little") < height * (-(-width * bits // 32) * 4):
        raise ImageError("truncated BMP")
    return Size(height, width)


def read_webp(data: bytes) -> Size:
    """Raises ImageError for one that is cut off, damaged in its header, or an animation."""
    if len(data) < 30 or len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ImageError("truncated WebP")
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in _numbers(data, 26, 2, 2))
    elif kind == b"VP8L" and data[20] == 0x2F:
        sides = int.from_bytes(data[21:25], "little")
        width, height = (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        if data[20] & 2:
            raise ImageError("an animated WebP (mend: keep one of its frames)")
        width, height = (side + 1 for side in _numbers(data, 24, 3, 2))
    else:
        raise ImageError("damaged WebP (no image behind its header)")
    return Size(height, width)


def _numbers(data: bytes, start: int, length: int, count: int) -> list[int]:
    end = start + count * length
    return [int.from_bytes(data[at : at + length], "little") for at in range(start, end, length)]
