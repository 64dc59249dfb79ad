"""The header of a TIFF: the size of its first page, and whether OpenCV decodes that page to what it shows.

OpenCV leaves most kinds to libtiff's conversion to 8-bit RGBA. That takes signed numbers for unsigned ones and Lab for
RGB, and leaves the pixels of damaged strips as they are, without a word. So those kinds are refused, and strips are
checked here where this is possible: uncompressed ones by their length, deflated ones by decompressing them. In the
others (LZW, JPEG, PackBits, fax) damage is not detected.
"""

import zlib
from collections.abc import Sequence
from typing import Literal

from datasets.images.header import ImageError, Size, check_decompressed

_LENGTHS = {1: 1, 3: 2, 4: 4}  # BYTE, SHORT, LONG
_MOST_VALUES = 2**20  # of one tag: strips or tiles
_MOST_STRIP_BYTES = 3 * 2**26  # libtiff takes four times as much
_BLOCK = 2**20
_PLAIN, _DEFLATED = 1, (8, 32946)
_COMPRESSIONS = (_PLAIN, *_DEFLATED, 2, 3, 4, 5, 7, 32773)  # fax, LZW, JPEG, PackBits
_PALETTE, _YCBCR = 3, 6
# Bits a sample, by colour space: grey (white or black is 0), RGB, palette, CMYK, YCbCr
_BITS_OF = {0: (1, 8, 16), 1: (1, 8, 16), 2: (8, 16), _PALETTE: (1, 4, 8), 5: (8,), _YCBCR: (8,)}
_NEW_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOUR = 254, 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _SAMPLE_FORMAT = 322, 323, 324, 325, 339
_TAGS = (
    *(_NEW_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOUR),
    *(_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR),
    *(_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _SAMPLE_FORMAT),
)


class Tiff:
    """The first page of a TIFF. Making one raises ImageError for a file that is cut off or of an unsupported kind."""

    def __init__(self, data: bytes) -> None:
        tags = _first_directory(data)

        def one(tag: int, default: int = 0) -> int:
            return next(iter(tags.get(tag, ())), default)

        self._data, self.size = data, Size(one(_HEIGHT), one(_WIDTH))
        self._compression, self._colour, samples = one(_COMPRESSION, 1), one(_COLOUR, -1), one(_SAMPLES, 1)
        bits, formats = set(tags.get(_BITS, (1,))), set(tags.get(_SAMPLE_FORMAT, (1,)))
        if formats != {1} or not bits <= set(_BITS_OF.get(self._colour, ())) or len(bits) != 1 or not 1 <= samples <= 4:
            kind = f"{samples} samples of {_listed(bits)} bits, format {_listed(formats)}, colour space {self._colour}"
            raise ImageError(f"a TIFF with {kind}, not supported (mend: save it as PNG)")
        if self._compression not in _COMPRESSIONS:
            raise ImageError(f"a TIFF with compression {self._compression}, not supported (mend: save it as PNG)")
        if one(_NEW_SUBFILE_TYPE) & 1:
            raise ImageError("a TIFF that begins with a thumbnail, as raw photographs do, not supported")

        if _TILES in tags:
            self._starts, self._lengths = tags[_TILES], tags.get(_TILE_BYTES, [])
            rows, columns, all_rows = one(_TILE_HEIGHT), one(_TILE_WIDTH), 0
            across = -(-self.size.width // max(1, columns))
        else:
            self._starts, self._lengths = tags.get(_STRIPS, []), tags.get(_STRIP_BYTES, [])
            rows, columns, all_rows = min(one(_ROWS, self.size.height), self.size.height), *self.size[::-1]
            across = 1
        ends = (start + length for start, length in zip(self._starts, self._lengths, strict=False))
        if len(self._starts) != len(self._lengths) or max(ends, default=len(data) + 1) > len(data):
            raise ImageError("truncated TIFF")

        together = samples if one(_PLANAR, 1) == 1 else 1
        self._row_bytes = -(-columns * together * max(bits) // 8)
        self._rows, self._all_rows, self._planes = rows, all_rows, samples // together
        if rows * columns == 0 or rows * columns * samples * max(bits) // 8 > _MOST_STRIP_BYTES:
            raise ImageError(f"a TIFF in pieces of no or more than {_MOST_STRIP_BYTES} bytes, not supported")
        pieces = across * -(-self.size.height // rows)
        self._pieces = pieces * self._planes
        # At least 3 bytes a pixel, with what tiles have beyond the picture's edges.
        self._total = pieces * rows * max(self._planes * self._row_bytes, 3 * columns)

    def check_pixels(self) -> None:
        """Raises ImageError if a strip or tile is known not to hold its pixels, or they would take too long."""
        self._check_pieces()
        if self._colour == _YCBCR:  # its strips may be smaller: colours can be subsampled
            return
        plane = max(1, len(self._starts) // self._planes)
        for number, (start, length) in enumerate(zip(self._starts, self._lengths, strict=True)):
            rows = self._rows
            if self._all_rows:
                rows = min(rows, max(0, self._all_rows - number % plane * rows))
            expected = rows * self._row_bytes
            whole = length >= expected if self._compression == _PLAIN else True
            if self._compression in _DEFLATED:
                whole = _inflates_to(memoryview(self._data)[start : start + length], expected)
            if not whole:
                raise ImageError(f"damaged TIFF (its strip or tile {number} does not hold its pixels)")

    def _check_pieces(self) -> None:
        """Without this a small file of many tiles, all in one place, would be decompressed for days."""
        if len(self._starts) != self._pieces:
            raise ImageError(f"damaged TIFF ({len(self._starts)} strips or tiles, where its size needs {self._pieces})")
        if sum(self._lengths) > len(self._data):
            raise ImageError("damaged TIFF (its strips or tiles overlap)")
        check_decompressed(self._total)


def _inflates_to(deflated: memoryview, expected: int) -> bool:
    """Whether there are at least so many bytes in it."""
    inflate, inflated = zlib.decompressobj(), 0
    waiting: memoryview | bytes
    try:
        for start in range(0, len(deflated), _BLOCK):
            waiting, more = deflated[start : start + _BLOCK], True
            while more and inflated < expected and not inflate.eof:
                block = inflate.decompress(waiting, _BLOCK)
                inflated, waiting = inflated + len(block), inflate.unconsumed_tail
                more = bool(waiting) or len(block) == _BLOCK
    except zlib.error:
        return False
    return inflated >= expected


def _first_directory(data: bytes) -> dict[int, Sequence[int]]:
    """Values of those of `_TAGS` that are there."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"

    def number(at: int, length: int) -> int:
        return int.from_bytes(data[at : at + length], order)

    tags: dict[int, Sequence[int]] = {}
    directory = number(4, 4)
    end = directory + 2 + 12 * number(directory, 2)
    if directory < 8 or end > len(data):
        raise ImageError("truncated TIFF (no directory)")
    for entry in range(directory + 2, end, 12):
        tag, kind, count = number(entry, 2), number(entry + 2, 2), number(entry + 4, 4)
        if tag not in _TAGS:
            continue
        length = _LENGTHS.get(kind, 0)
        start = entry + 8 if count * length <= 4 else number(entry + 8, 4)
        if tag in tags or not length or count > _MOST_VALUES or start + count * length > len(data):
            raise ImageError(f"truncated or damaged TIFF (tag {tag})")
        tags[tag] = [number(at, length) for at in range(start, start + count * length, length)]
    return tags


def _listed(numbers: set[int]) -> str:
    return ", ".join([*(str(number) for number in sorted(numbers)[:4]), *(["..."] if len(numbers) > 4 else [])])
