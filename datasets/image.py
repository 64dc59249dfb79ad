"""Decoding of one photograph: the pixels that `cv2.imread(path)` gives, or an ImageError that says what is wrong.

Rules, all of them OpenCV's (`IMREAD_COLOR`), so that pixels equal the published code's byte for byte:

- the result is uint8 [H, W, 3] in the order blue, green, red, C-contiguous;
- an EXIF orientation is applied: the array is upright, and H and W are those after the rotation;
- grey becomes three equal channels; a palette is expanded;
- 16 bits a channel become 8 by keeping the high byte (`value >> 8`, no rounding);
- alpha is dropped, not blended: the colour under a transparent pixel stays;
- CMYK and YCCK JPEGs are converted by OpenCV's simple formula, without any colour profile;
- an embedded ICC profile is ignored.

Stricter than `imread` in one point: libjpeg fills the missing part of a truncated JPEG with grey and only prints a
warning. Such a file is refused here. JPEG and PNG are checked before decoding, so that no library prints anything
about them; other formats (WebP, TIFF, BMP, ...) are refused by OpenCV itself when they are cut off. Flipped bits
inside compressed data are not detected.

All of this holds for a decode at reduced size too (`ImageFile.decode`, for JPEG): libjpeg then leaves the high
frequencies out, which averages blocks of pixels and takes about 60 % of the time.

Where simplejpeg is installed, it decodes the upper part of a JPEG where no more is needed (`ImageFile.decode_rows`):
the same pixels, since both are libjpeg-turbo. As a decoder it is no faster than OpenCV. Tried: the same with OpenCV,
which then complains on stderr; its fast DCT, which gains 3 % and moves pixels by up to 9 levels.
"""

import os
import re
from typing import NamedTuple

import cv2
import numpy as np

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# A marker that is neither a stuffed zero (FF 00), a fill byte (FF FF) nor a restart (FF D0 .. FF D7).
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_TEM, _SOI, _EOI, _SOS = 0x01, 0xD8, 0xD9, 0xDA
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APP1 = 0xE1
_MOST_PIXELS = 2**30  # OpenCV refuses more
_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class ImageError(ValueError):
    """A file that is not a complete, readable image; the message is one line: path and reason."""


def decode(path: str | os.PathLike) -> np.ndarray:
    """The image in `path` as uint8 [H, W, 3], BGR, C-contiguous (the rules stand at the top of this file).

    Raises ImageError for a file that is missing, unreadable, a folder, empty, truncated or not an image.
    """
    return ImageFile(path).decode()


class ImageFile:
    """The bytes of an image file that is there and not cut off; whether they can be decoded is seen by decoding."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Reads the file. Raises ImageError as `decode` does, but for a file that is not an image."""
        self.path, self._data = path, _read(path)
        self._is_jpeg = self._data.startswith(b"\xff\xd8\xff")
        if self._is_jpeg and not _jpeg_is_complete(self._data):
            raise ImageError(f"{path}: truncated or damaged JPEG (no end-of-image marker behind its scans)")
        if self._data.startswith(_PNG_SIGNATURE) and not _png_is_complete(self._data):
            raise ImageError(f"{path}: truncated or damaged PNG (no IEND chunk at its end)")

        self._frame = _jpeg_frame(self._data) if self._is_jpeg else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the upright image, of a JPEG with a plain header: told without decoding. Else None."""
        if self._frame is None:
            return None
        height, width = self._frame.height, self._frame.width
        return (width, height) if self._frame.orientation in (5, 6, 7, 8) else (height, width)

    @property
    def reductions(self) -> list[int]:
        """By how much `decode` can reduce: 1, and some of 2, 4 and 8 if the size is told."""
        if self._frame is None:
            return [1]
        # Blocks are counted from a corner of the stored image; turned round, the corner must lie on a block's edge.
        sides = self._frame.height, self._frame.width
        return [f for f in _FLAGS if self._frame.orientation == 1 or all(side % f == 0 for side in sides)]

    def decode(self, reduction: int = 1) -> np.ndarray:
        """uint8 [H, W, 3] BGR; with a reduction f of `reductions` [ceil(H / f), ceil(W / f), 3].

        Pixel (y, x) is then about the mean of the pixels f y .. f y + f - 1, f x .. f x + f - 1. Raises ImageError.
        """
        level = cv2.utils.logging.setLogLevel(0)  # silent: what OpenCV would print is told by the exception
        try:
            image = cv2.imdecode(np.frombuffer(self._data, np.uint8), _FLAGS[reduction])
        except cv2.error as error:  # e.g. more than 2**30 pixels
            raise ImageError(f"{self.path}: OpenCV refuses this image ({error.err})") from error
        finally:
            cv2.utils.logging.setLogLevel(level)
        if image is None:
            raise ImageError(f"{self.path}: not an image that OpenCV can read")
        if image.size == 0:
            raise ImageError(f"{self.path}: an image without pixels")
        return image

    def decode_rows(self, end: int) -> np.ndarray:
        """`decode()[:n]` for some n >= `end`, or all of it: as few rows as can be decoded alone. Raises ImageError."""
        frame = self._frame
        if simplejpeg is None or frame is None or not frame.by_rows or end + 1 >= frame.height:
            return self.decode()
        # Entropy-coded data are read from top to bottom: with a smaller height in the header the decoder stops there.
        # The last row is not as it should be, since its colour is interpolated with the next one's.
        shortened = self._data[: frame.at] + (end + 1).to_bytes(2, "big") + self._data[frame.at + 2 :]
        try:
            # Not strict: as OpenCV, it goes on where the data are damaged.
            return simplejpeg.decode_jpeg(shortened, "BGR", strict=False)[:-1]
        except ValueError:  # what this JPEG is, OpenCV decides
            return self.decode()


def _read(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: a folder, not an image file") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise ImageError(f"{path}: the file is empty")
    return data


def _jpeg_is_complete(data: bytes) -> bool:
    """Whether an end-of-image marker (FF D9) stands behind the scans; bytes behind it are allowed.

    Walks from segment to segment by their lengths, so that an FF D9 inside one (an EXIF thumbnail ends with it) is
    never taken for the end. Compressed data cannot hold a marker: an FF there is followed by 00 or is a restart.
    """
    position, components = 2, None
    while (match := _MARKER.search(data, position)) is not None:
        position = match.end()
        marker = data[position - 1]
        if marker == _EOI:
            return True
        if marker == _SOI:  # the file was cut and another image begins
            return False
        if marker == _TEM:
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        if marker in _SEQUENTIAL_FRAMES:
            components = data[position + 7 : position + 8]
        if marker == _SOS:
            # One scan with every component is the whole image, nothing but its compressed data follows: if the file
            # ends with FF D9, that is the end marker. Saves searching the data (1 to 3 % of the decoding time).
            whole = data[position + 2 : position + 3] == components
            if whole and end + 2 <= len(data) and data.endswith(b"\xff\xd9"):
                return True
        position = end
    return False


class _Frame(NamedTuple):
    """What stands in a JPEG's header."""

    at: int  # where the height stands, two bytes
    height: int
    width: int
    orientation: int
    by_rows: bool  # upright, 8 bits, grey or colour, in one sequential scan: its upper part can be decoded alone


def _jpeg_frame(data: bytes) -> _Frame | None:
    """Read the segments up to the first scan; None if anything about the size is odd."""
    position, orientation, frame = 2, None, None
    while (match := _MARKER.search(data, position)) is not None:
        marker, start = data[match.end() - 1], match.end()
        position = start + int.from_bytes(data[start : start + 2], "big")
        if marker == _APP1 and data[start + 2 : start + 8] == b"Exif\0\0":
            if orientation is not None:  # a second one: which of them counts?
                return None
            orientation = _exif_orientation(data[start + 8 : position])
            if orientation is None:
                return None
        elif marker in _FRAMES:
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start + 3, start + 5))
            if frame is not None or not 0 < height * width <= _MOST_PIXELS:
                return None
            components = data[start + 7 : start + 8]
            plain = marker in _SEQUENTIAL_FRAMES and data[start + 2] == 8 and components in (b"\1", b"\3")
            frame = _Frame(start + 3, height, width, 1, plain)
        elif marker == _SOS:
            if frame is None:
                return None
            by_rows = frame.by_rows and data[start + 2 : start + 3] == components and orientation in (None, 1)
            return frame._replace(orientation=orientation or 1, by_rows=by_rows)
    return None


def _exif_orientation(tiff: bytes) -> int | None:
    """The orientation in the first directory, 1 if it has none, None if this is not understood."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return None

    def number(at: int, length: int) -> int:
        return int.from_bytes(tiff[at : at + length], order)

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if entry + 12 > len(tiff):
            return None
        if number(entry, 2) == 0x0112:
            short = number(entry + 2, 2) == 3 and number(entry + 4, 4) == 1
            return number(entry + 8, 2) if short else None
    return 1


def _png_is_complete(data: bytes) -> bool:
    """Whether the chunks lead to a complete IEND; bytes behind it are allowed."""
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):  # length, type and checksum take 4 bytes each
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return False
