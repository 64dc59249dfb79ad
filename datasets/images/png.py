"""A PNG is checked in full before libpng sees it, since libpng writes to stderr whatever it does not like.

What does not change the pixels is left out on the way: profiles and texts, among them compressed ones of any size,
transparency (the colour counts, whatever its alpha), and all frames of an animation but the image that a reader
without animations shows.
"""

import re
import zlib

from datasets.images.header import ImageError, Size, check_decompressed

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST_CHUNKS = 100_000
_NAME = re.compile(rb"[A-Za-z]{2}[A-Z][A-Za-z]")  # others libpng refuses
_ORDER = re.compile("IHDR (PLTE )?(IDAT )+IEND")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: grey, RGB, palette, and with alpha
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_BLOCK = 2**18


def read_png(data: bytes) -> Size:
    """Raises ImageError for a header that is damaged."""
    if data[8:16] != b"\0\0\0\x0dIHDR" or len(data) < 33:
        raise ImageError("truncated or damaged PNG (no header)")
    depth, colour, compression, filtering, interlaced = data[24:29]
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlaced > 1:
        raise ImageError("damaged PNG (impossible header)")
    return Size(int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big"))


def cleaned(data: bytes) -> bytes:
    """The PNG with nothing but what makes its pixels. Raises ImageError if it is cut off or damaged."""
    header, depth, colour = read_png(data), data[24], data[25]
    position, kinds, has_exif = len(_SIGNATURE), [], False
    parts: list[memoryview] = []
    kept: list[bytes | memoryview] = [_SIGNATURE]
    view, before = memoryview(data), b""
    for _ in range(_MOST_CHUNKS):
        length, name = int.from_bytes(view[position : position + 4], "big"), bytes(view[position + 4 : position + 8])
        start, end = position + 8, position + 12 + length
        if end > len(data):
            raise ImageError("truncated or damaged PNG (no IEND chunk at its end)")
        payload, position = view[start : end - 4], end
        # Of every chunk: one whose name is damaged may have been the orientation.
        if zlib.crc32(payload, zlib.crc32(name)) != int.from_bytes(view[end - 4 : end], "big"):
            raise ImageError(f"damaged PNG (wrong checksum of its {name!a} chunk)")
        if not _NAME.fullmatch(name):
            raise ImageError(f"damaged PNG (no chunk is called {name!a})")
        if name == b"IDAT" and parts and before != b"IDAT":
            raise ImageError("damaged PNG (its IDAT chunks are apart)")
        before = name
        if name[:1].islower() and name != b"eXIf":
            continue
        chunk = view[start - 8 : end]
        if name == b"eXIf":  # libpng complains about a second one, and about one that is no TIFF
            if not has_exif and bytes(payload[:4]) in (b"II*\0", b"MM\0*"):
                kept.append(chunk)
            has_exif = True
            continue
        kinds.append(name.decode("latin-1"))
        if name == b"IDAT":
            parts.append(payload)
        if name == b"PLTE" and (len(payload) not in range(3, 769, 3)):
            raise ImageError("damaged PNG (palette)")
        if name != b"PLTE" or colour == 3:  # without colour type 3 it is a suggestion
            kept.append(chunk)
        if name == b"IEND":
            break
    else:
        raise ImageError(f"damaged PNG (more than {_MOST_CHUNKS} chunks)")
    if not _ORDER.fullmatch(" ".join(kinds)) or (colour == 3) > ("PLTE" in kinds):
        raise ImageError("damaged PNG (its chunks are not those of an image)")
    _check_pixels(parts, _rows(header, depth * _CHANNELS[colour], interlaced=data[28] == 1))
    return b"".join(kept)


def _rows(size: Size, bits: int, *, interlaced: bool) -> list[tuple[int, int]]:
    """(Rows, bytes of a row with its filter's number) of each pass."""
    passes = []
    for left, top, right, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        height, width = -(-(size.height - top) // down), -(-(size.width - left) // right)
        if height > 0 and width > 0:
            passes.append((height, 1 + -(-width * bits // 8)))
    return passes


def _check_pixels(parts: list[memoryview], passes: list[tuple[int, int]]) -> None:
    """Decompress without keeping: the right number of bytes, the right checksum, known filters."""
    expected, inflated = sum(rows * stride for rows, stride in passes), 0
    check_decompressed(expected)
    inflate = zlib.decompressobj()
    waiting: memoryview | bytes
    try:
        for part in parts:
            for start in range(0, len(part), _BLOCK):
                waiting, more = part[start : start + _BLOCK], True
                while more and not inflate.eof:
                    block = inflate.decompress(waiting, 4 * _BLOCK)
                    if len(passes) == 1:
                        stride = passes[0][1]
                        if max(block[-inflated % stride :: stride], default=0) > 4:
                            raise ImageError("damaged PNG (unknown filter)")
                    inflated += len(block)
                    if inflated > expected:
                        raise ImageError("damaged PNG (more pixels than its header says)")
                    waiting = inflate.unconsumed_tail
                    more = bool(waiting) or len(block) == 4 * _BLOCK
    except zlib.error as error:
        raise ImageError(f"damaged PNG (its compressed data: {error})") from error
    if not inflate.eof or inflated < expected:
        raise ImageError("truncated or damaged PNG (fewer pixels than its header says)")
