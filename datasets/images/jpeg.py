"""The structure of a JPEG: the size in its header, its orientation, and whether it is complete."""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from datasets.images.header import ImageError, Size

# A marker that is neither a stuffed zero (FF 00), a fill byte (FF FF) nor a restart (FF D0 .. FF D7).
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}  # of EXIF
_TEM, _SOI, _EOI, _SOS, _APP1 = 0x01, 0xD8, 0xD9, 0xDA, 0xE1
_SEQUENTIAL_FRAMES, _PROGRESSIVE_FRAME = (0xC0, 0xC1), 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MOST_SEGMENTS = 10_000
# Every scan goes through all pixels, however few its bytes: 0.3 s for 2**30 of them. Usual are up to 12 scans.
_MOST_SCANS, _MOST_SCANNED_PIXELS = 1000, 2**32


class Frame(NamedTuple):
    """What stands in a JPEG's header."""

    at: int  # where the height stands, two bytes
    size: Size
    components: int
    sequential: bool
    plain: bool  # 8 bits, grey or colour, Huffman-coded: what libjpeg-turbo's own interface decodes
    by_rows: bool = False  # plain, upright, in one sequential scan: its upper part can be decoded alone
    orientation: int | None = 1  # as EXIF numbers it; None if that is not understood

    @property
    def upright(self) -> Size | None:
        """The size after the orientation is applied, if that is understood."""
        if self.orientation is None:
            return None
        return Size(self.size.width, self.size.height) if self.orientation in (5, 6, 7, 8) else self.size


def read_jpeg(data: bytes) -> Frame:
    """The header of a complete JPEG; bytes behind its end-of-image marker (FF D9) are allowed.

    Raises ImageError for a file that is cut off, or has no or two headers, or more scans than a photograph needs.
    """
    frame, orientations, scans = None, [], 0
    for marker, start, end in _segments(data):
        if marker in _FRAMES:
            if frame is not None:
                raise ImageError("damaged JPEG (two frame headers)")
            frame = _frame(data, marker, start)
        elif marker == _APP1 and scans == 0 and data[start + 2 : start + 8] == b"Exif\0\0":
            orientations.append(_exif_orientation(data[start + 8 : end]))
        elif marker == _SOS:
            scans += 1
            if frame is None:
                raise ImageError("damaged JPEG (no frame header before its first scan)")
            if scans > min(_MOST_SCANS, _MOST_SCANNED_PIXELS // max(1, frame.size.height * frame.size.width)):
                raise ImageError(f"a JPEG of {frame.size.width} x {frame.size.height} pixels in {scans} scans or more")
            if scans == 1:
                whole = frame.sequential and data[start + 2 : start + 3] == bytes([frame.components])
                # Of two EXIF segments, which counts?
                orientation = (*orientations, 1)[0] if len(orientations) < 2 else None
                by_rows = frame.plain and whole and orientation == 1
                frame = frame._replace(by_rows=by_rows, orientation=orientation)
                # One scan with every component is the whole image, nothing but its compressed data follows: if the
                # file ends with FF D9, that is the end marker. Saves searching the data (1 to 3 % of a decode).
                if whole and end + 2 <= len(data) and data.endswith(b"\xff\xd9"):
                    break
        elif marker == _EOI:
            if scans == 0:
                raise ImageError("damaged JPEG (no image in it)")
            break
    assert frame is not None  # there is no scan without one
    return frame


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(Marker, start, end) of one after the other, to the end or until no end can come.

    Walks by their lengths, so that an FF D9 inside one (an EXIF thumbnail ends with it) is never taken for the end.
    Compressed data cannot hold a marker: an FF there is followed by 00 or is a restart.
    """
    position = 2
    for _ in range(_MOST_SEGMENTS):
        match = _MARKER.search(data, position)
        if match is None or data[match.end() - 1] == _SOI:  # SOI: the file was cut and another image begins
            raise ImageError("truncated or damaged JPEG (no end-of-image marker behind its scans)")
        start = position = match.end()
        if data[start - 1] != _TEM:
            position = start + int.from_bytes(data[start : start + 2], "big")
            yield data[start - 1], start, position
    raise ImageError(f"damaged JPEG (more than {_MOST_SEGMENTS} segments)")


def _frame(data: bytes, marker: int, start: int) -> Frame:
    height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start + 3, start + 5))
    components = int.from_bytes(data[start + 7 : start + 8], "big")
    sequential = marker in _SEQUENTIAL_FRAMES
    eight_bits = data[start + 2 : start + 3] == b"\x08"
    plain = (sequential or marker == _PROGRESSIVE_FRAME) and eight_bits and components in (1, 3)
    return Frame(start + 3, Size(height, width), components, sequential, plain)


def _exif_orientation(tiff: bytes) -> int | None:
    """The orientation in the first directory, 1 if it has none, None if this is not understood."""
    order = _BYTE_ORDERS.get(tiff[:4])
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
