"""The images to describe: their names, files and boxes, in order."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.image import ImageError, decode
from revisitop import groundtruth

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ImageList:
    """Images by name, where they lie, and the part of each that counts (None: all of it)."""

    names: list[str]
    paths: list[Path]
    boxes: list[Box | None]

    def __len__(self) -> int:
        return len(self.names)

    def shard(self, cut: int, total: int) -> "ImageList":
        """The images whose index modulo `total` is `cut - 1`, as the published code splits them."""
        return ImageList(*(column[cut - 1 :: total] for column in (self.names, self.paths, self.boxes)))

    def sha256(self) -> str:
        """Of names, boxes and file sizes, so that it changes with the list and (nearly always) with the pictures.

        Raises `ImageError` for files that are missing.
        """
        digest = hashlib.sha256()
        missing = []
        for name, path, box in zip(self.names, self.paths, self.boxes, strict=True):
            try:
                size = os.stat(path).st_size
            except OSError:
                missing.append(path)
                continue
            digest.update(f"{name}\t{box}\t{size}\n".encode())
        if missing:
            raise ImageError(f"{missing[0]}: no such image ({len(missing)} of {len(self)} images missing)")
        return digest.hexdigest()


def revisited_set(data_dir: str | os.PathLike, name: str, *, crop_query: bool) -> dict[str, ImageList]:
    """The collections `queries` and `database` of DATA_DIR/<name>; queries with their boxes if they are cropped."""
    folder = Path(data_dir) / name
    truth = groundtruth.load(folder / f"gnd_{name}.pkl")
    boxes = [query.bbx if crop_query else None for query in truth.gnd]
    return {
        collection: ImageList(list(names), [folder / "jpg" / f"{image}.jpg" for image in names], list(boxes))
        for collection, names, boxes in (
            ("queries", truth.qimlist, boxes),
            ("database", truth.imlist, [None] * len(truth.imlist)),
        )
    }


def image_folder(folder: str | os.PathLike) -> tuple[ImageList, int]:
    """Every image below `folder`, named by its relative path, sorted; and how many other files there are.

    What counts as an image is decided by the extension (`EXTENSIONS`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"INFER.IMAGES {folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    if not images:
        raise ImageError(f"INFER.IMAGES {folder}: no image in it (looked for {' '.join(EXTENSIONS)})")
    names = [path.relative_to(folder).as_posix() for path in images]
    for name in names:  # each becomes a line of a table
        if re.search(r"[\t\n\r\ud800-\udfff]", name):
            raise ImageError(f"INFER.IMAGES {folder}: {name!a} holds a tab, a line break or no UTF-8, rename that file")
    return ImageList(names, images, [None] * len(images)), len(files) - len(images)


def read_cropped(path: Path, box: Box | None) -> np.ndarray:
    """Decode an image and cut its box out: uint8 [H, W, 3] BGR. Raises `ImageError`."""
    image = crop(decode(path), box)
    if image.size == 0:
        raise ImageError(f"{path}: the query's box {box} lies outside the picture")
    return image


def crop(image: np.ndarray, box: Sequence[float] | None) -> np.ndarray:
    """Cut the box (x1, y1, x2, y2 in pixels, truncated to integers as published) out of [H, W, 3]; None keeps all."""
    if box is None:
        return image
    x1, y1, x2, y2 = (int(side) for side in box)
    return image[y1:y2, x1:x2]
