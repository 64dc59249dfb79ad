"""Decoding of one photograph: the pixels that `cv2.imread(path)` gives, or an ImageError that says what is wrong.

Formats, told by content and not by name: JPEG, PNG, BMP, WebP, TIFF. Rules, all of them OpenCV's (`IMREAD_COLOR`), so
that pixels equal the published code's byte for byte:

- the result is uint8 [H, W, 3] in the order blue, green, red, C-contiguous;
- an EXIF orientation is applied: the array is upright, and H and W are those after the rotation;
- grey becomes three equal channels; a palette is expanded;
- 16 bits a channel become 8 by keeping the high byte (`value >> 8`, no rounding), in a TIFF with colour by rounding
  `value * 255 / 65535`; TIFFs of 32 and 64 bits, floats and signed numbers are refused;
- alpha is dropped, not blended: the colour under a transparent pixel stays. Only in a TIFF, where alpha is marked as
  not yet multiplied in, libtiff multiplies it in: transparent pixels are black;
- CMYK and YCCK are converted by OpenCV's simple formula, without any colour profile;
- an embedded ICC profile is ignored;
- of several images in a file the first counts: a TIFF's first page, a JPEG's main image, an animated PNG's still one.
  An animated WebP is refused, and a TIFF that begins with a thumbnail, as raw photographs do.

Stricter than `imread`:

- a file that is cut off is refused, in a JPEG also one whose compressed data end early or are left over: libjpeg fills
  what is missing with grey and only prints a warning. Flipped bits that leave the data readable are not detected, nor
  is damage in WebP, in BMP and in TIFFs that are neither plain nor deflated. A PNG's chunks carry checksums and are all
  checked, those without pixels too;
- MAX_PIXELS, MAX_BYTES and bounds on the number of scans, segments and chunks keep a decode below 1 GB and, for what
  expands from a small file, 5 seconds. The size is read from the header, before anything is decoded, and compared with
  what is decoded.

All of this holds for a decode at reduced size too (`ImageFile.decode`, for JPEG), but for damage inside the compressed
data: libjpeg then leaves the high frequencies out, which averages blocks of pixels and takes about 60 % of the time.

Where simplejpeg is installed, it decodes JPEGs: the same pixels, since both are libjpeg-turbo, but libjpeg's warnings
are told instead of printed, and the upper part can be decoded where no more is needed (`ImageFile.decode_rows`).
Without it, and where simplejpeg refuses (stray bytes between a header's segments, an unknown JFIF version), OpenCV
decodes: the warnings go to stderr, and data that end early are not detected. Tried: decoding the upper part with
OpenCV, which then complains on stderr; its fast DCT, which gains 3 % and moves pixels by up to 9 levels.
"""

import os
import re
import stat

import cv2
import numpy as np

from datasets.images.header import ImageError, Size, format_of, read_bmp, read_webp
from datasets.images.jpeg import Frame, read_jpeg
from datasets.images.png import cleaned, read_png
from datasets.images.tiff import Tiff
from datasets.normalisation import note_on_path

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 2**26  # 8192 x 8192; decoding that many takes up to 0.9 GB
MAX_BYTES = 2**28
_MAX_SIDE = 65_500  # libjpeg's bound
_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_READERS = {"BMP": read_bmp, "PNG": read_png, "TIFF": lambda data: Tiff(data).size, "WebP": read_webp}
# After these libjpeg goes on although pixels are missing or wrong, at the last two where it is not asked for the end of
# the file, as by OpenCV. A few bytes too many before a marker do no harm.
_DAMAGE = re.compile(
    r"premature end|bad Huffman code|instead of RST|\d{3} extraneous|unsupported marker type|more than one scan",
    re.IGNORECASE,
)
_MARK = np.random.default_rng(0).integers(0, 256, (_MAX_SIDE, 3), np.uint8)  # a row that no image has
# EXIF's orientation -> (transpose?, mirror), to be applied in this order; the mirror is cv2.flip's.
TURNS = {2: (False, 1), 3: (False, -1), 4: (False, 0), 5: (True, None), 6: (True, 1), 7: (True, -1), 8: (True, 0)}


def decode(path: str | os.PathLike, data: bytes | None = None, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image in `path` as uint8 [H, W, 3], BGR, C-contiguous (the rules stand at the top of this file).

    If `data` is given, it is the file's content and nothing is read: `path` is only its name in messages.
    Raises ImageError for what is missing, unreadable, no regular file, empty, cut off, too large or not an image.
    """
    return ImageFile(path, data, max_pixels=max_pixels).decode()


class ImageFile:
    """The bytes of an image file of a known format and a size within bounds; the rest is seen by decoding."""

    def __init__(self, path: str | os.PathLike, data: bytes | None = None, *, max_pixels: int = MAX_PIXELS) -> None:
        """Reads the file, unless its `data` are given. Raises ImageError as `decode` does."""
        self.path, self._data = path, read_file(path) if data is None else data
        self._frame: Frame | None = None
        try:
            self._stored = self._read_header(max_pixels)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None

    def _read_header(self, max_pixels: int) -> Size:
        """The size as stored. Raises ImageError without the path."""
        if not self._data:
            raise ImageError("the file is empty")
        if len(self._data) > MAX_BYTES:
            raise ImageError(too_many_bytes(len(self._data)))
        self._format = format_of(self._data)
        if self._format == "JPEG":
            self._frame = read_jpeg(self._data)
            size = self._frame.size
        else:
            size = _READERS[self._format](self._data)
        if min(size) == 0:
            raise ImageError("an image without pixels")
        if size.height * size.width > max_pixels:
            raise ImageError(f"{size.width} x {size.height} pixels, more than {max_pixels} (mend: make it smaller)")
        if max(size) > _MAX_SIDE:
            raise ImageError(f"{size.width} x {size.height} pixels, more than {_MAX_SIDE} a side (mend: cut it)")
        return size

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the upright image, of a JPEG with a plain header: told without decoding. Else None."""
        return self._frame.upright if self._frame is not None else None

    @property
    def orientation(self) -> int | None:
        """EXIF's, of a plain JPEG (8 bits, grey or colour, Huffman-coded), perhaps none of `TURNS`; else None."""
        return self._frame.orientation if self._frame is not None and self._frame.plain else None

    @property
    def reductions(self) -> list[int]:
        """By how much `decode` can reduce: 1, and some of 2, 4 and 8 if the size is told."""
        frame, size = self._frame, self.size
        if frame is None or size is None:
            return [1]
        # Blocks are counted from a corner of the stored image; turned round, the corner must lie on a block's edge.
        return [f for f in _FLAGS if frame.orientation == 1 or all(side % f == 0 for side in size)]

    def decode(self, reduction: int = 1) -> np.ndarray:
        """uint8 [H, W, 3] BGR; with a reduction f of `reductions` [ceil(H / f), ceil(W / f), 3].

        Pixel (y, x) is then about the mean of the pixels f y .. f y + f - 1, f x .. f x + f - 1. Raises ImageError.
        """
        try:
            image = self._by_libjpeg() if reduction == 1 else None
            if image is None:
                image = self._by_opencv(reduction)
            self._check_size(image, reduction)
        except ImageError as error:
            raise ImageError(f"{self.path}: {error}") from error
        return image

    def decode_rows(self, end: int) -> np.ndarray:
        """`decode()[:n]` for some n >= `end`, or all of it: as few rows as can be decoded alone. Raises ImageError.

        Where rows are decoded alone, damage inside the compressed data is not looked for.
        """
        frame = self._frame
        if simplejpeg is None or frame is None or not frame.by_rows or end + 1 >= frame.size.height:
            return self.decode()
        # Entropy-coded data are read from top to bottom: with a smaller height in the header the decoder stops there.
        # The last row is not as it should be, since its colour is interpolated with the next one's.
        shortened = self._data[: frame.at] + (end + 1).to_bytes(2, "big") + self._data[frame.at + 2 :]
        rows = _lenient(shortened, Size(end + 1, frame.size.width))
        return self.decode() if rows is None else rows[:-1]

    def _by_libjpeg(self) -> np.ndarray | None:
        """What OpenCV gives for a JPEG, or None if OpenCV has to do it. Raises ImageError if pixels are missing."""
        frame = self._frame
        if simplejpeg is None or frame is None or frame.orientation is None or frame.components not in (1, 3, 4):
            return None
        try:
            image = simplejpeg.decode_jpeg(self._data, "CMYK" if frame.components == 4 else "BGR")
        except ValueError as error:
            if _DAMAGE.search(str(error)):
                raise ImageError(f"damaged JPEG ({error})") from error
            image = _lenient(self._data, frame.size) if frame.plain else None
        if image is None or not frame.plain:  # the rest, CMYK included, has only been looked at for damage
            return None
        transpose, mirror = TURNS.get(frame.orientation, (False, None))
        image = cv2.transpose(image) if transpose else image
        return image if mirror is None else cv2.flip(image, mirror)

    def _by_opencv(self, reduction: int) -> np.ndarray:
        data = self._data
        if self._format == "PNG":
            data = cleaned(data)
        elif self._format == "TIFF":
            Tiff(data).check_pixels()
        level = cv2.utils.logging.setLogLevel(0)  # silent: what OpenCV would print is told by the exception
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), _FLAGS[reduction])
        except cv2.error as error:
            raise ImageError(f"OpenCV refuses this image ({error.err})") from error
        finally:
            cv2.utils.logging.setLogLevel(level)
        if image is None:
            raise ImageError(f"truncated or damaged {self._format} (OpenCV cannot read it)")
        return image

    def _check_size(self, image: np.ndarray, reduction: int) -> None:
        """What is decoded must be what the header says: a file can hold several images."""
        upright = self._frame.upright if self._frame is not None else None
        expected = tuple(-(-side // reduction) for side in upright or self._stored)
        if image.shape[:2] != expected and (upright is not None or image.shape[1::-1] != expected):
            height, width = image.shape[:2]
            raise ImageError(
                f"damaged {self._format} ({self._stored.width} x {self._stored.height} pixels by its header, "
                f"{width} x {height} decoded)"
            )


def _lenient(jpeg: bytes, size: Size) -> np.ndarray | None:
    """uint8 [H, W, 3] as OpenCV has it, which goes on where the data are damaged. None if that is not possible.

    simplejpeg returns memory as it was if a warning comes before an error: nothing has been written to the last row.
    """
    image = np.empty((*size, 3), np.uint8)
    image[-1] = mark = _MARK[: size.width]
    try:
        simplejpeg.decode_jpeg(jpeg, "BGR", buffer=image, strict=False)
    except ValueError:
        return None
    return None if image[-1].tobytes() == mark.tobytes() else image


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of a file. Raises ImageError for what is missing, no regular file, too large, or unreadable."""
    if "\0" in os.fspath(path):
        raise ImageError(f"{os.fspath(path)!a}: a zero byte, which no file's name can hold")
    try:
        # Without O_NONBLOCK a named pipe would be waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{path}: not a regular file (a pipe or device)")
            if status.st_size > MAX_BYTES:
                raise ImageError(f"{path}: {too_many_bytes(status.st_size)}")
            return file.read()
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file{note_on_path(path)}") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: a folder, not an image file") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error


def too_many_bytes(size: int) -> str:
    return f"{size} bytes, more than {MAX_BYTES} (mend: compress it, or make it smaller)"
