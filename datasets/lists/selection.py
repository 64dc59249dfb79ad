"""Which of the listed images are used, and for what: exclusions, missing files, training or validation."""

import os
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from datasets.lists.sources import IMAGE_ID, LANDMARK_ID, Listing, SourceError, gldv2_path


class Exclusions(NamedTuple):
    """The entries of a file, each with its line number."""

    file: str
    entries: dict[str, int]


def read_exclusions(file: str | os.PathLike) -> Exclusions:
    """Read one entry a line; `#` begins a comment at the start of a line or after a blank. Raises SourceError."""
    entries: dict[str, int] = {}
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                entry = "" if text.startswith("#") else text.replace("\t#", " #").split(" #")[0].rstrip()
                if entry:
                    entries.setdefault(entry, number)
    except UnicodeDecodeError:
        raise SourceError(f"{file}, line {number}: not UTF-8 text") from None
    except OSError as error:
        raise SourceError(f"{file}: the exclusions cannot be read ({error.strerror})") from error
    return Exclusions(str(file), entries)


def excluded_images(listing: Listing, exclusions: Exclusions) -> tuple[np.ndarray, list[str]]:
    """Which images (bool [N]) an entry names, by the image or by its class, and the entries that name nothing.

    An entry is an image's path or a class's name; for Google Landmarks v2 an image's id or a landmark's id. Raises
    SourceError for an entry that cannot be an id there.
    """
    images: dict[str, str] = {}  # path or class name -> entry as written
    classes: dict[str, str] = {}
    for entry, line in exclusions.entries.items():
        if not listing.is_gldv2:
            images[entry] = classes[entry] = entry
        elif IMAGE_ID.fullmatch(entry):
            images[gldv2_path(entry)] = entry
        elif LANDMARK_ID.fullmatch(entry):
            classes[str(int(entry))] = entry
        else:
            raise SourceError(
                f"{exclusions.file}, line {line}: {entry!a} is neither an image id (16 of 0-9a-f) nor a landmark id"
            )
    by_class = np.array([name in classes for name in listing.class_names], bool)[listing.classes]
    by_path = np.fromiter((path in images for path in listing.paths), bool, len(listing.paths))
    known = {classes[name] for name in listing.class_names if name in classes}
    known |= {images[path] for path in listing.paths if path in images}
    return by_class | by_path, [entry for entry in exclusions.entries if entry not in known]


def unseen_classes(listing: Listing, *, share: float, seed: int) -> np.ndarray:
    """Which classes (bool [K]) are kept from training altogether: `share` of those with two images or more.

    Rounded to the nearest number, one at least on either side. Classes are drawn in the order of a hash of seed and
    name: those that come or go leave the others where they are, but for the one that rounding moves.
    """
    several = np.flatnonzero(np.bincount(listing.classes, minlength=len(listing.class_names)) > 1)
    chosen = np.zeros(len(listing.class_names), bool)
    if not share:
        return chosen
    if len(several) < 2:
        raise SourceError(
            f"{listing.source}: --unseen needs two classes of two images or more; there are {len(several)}"
        )
    wanted = int(min(max(len(several) * share + 0.5, 1), len(several) - 1))
    digests = {k: blake2b(f"{seed} {listing.class_names[k]}".encode(), digest_size=8).digest() for k in several}
    chosen[sorted(several, key=lambda k: (digests[k], listing.class_names[k]))[:wanted]] = True
    return chosen


def with_classes_last(listing: Listing, last: np.ndarray) -> Listing:
    """The same images, their classes numbered anew: those of `last` (bool [K]) behind the others."""
    order = np.argsort(last, kind="stable")
    number = np.argsort(order)
    return replace(listing, classes=number[listing.classes], class_names=[listing.class_names[k] for k in order])


def validation_images(listing: Listing, *, share: float, seed: int) -> np.ndarray:
    """Which images (bool [N]) are for validation: in every class `share` of them, drawn by `seed`.

    Rounded to the nearest number, but a class with two images or more has at least one on either side, and a single
    image is for training. The order in which a class's images are drawn is that of a hash of seed and path: classes
    and images that come or go leave the others where they are, but for the one that rounding moves.
    """
    number = len(listing.paths)
    seeded = blake2b(f"{seed} ".encode(), digest_size=8)
    digests = []
    for path in listing.paths:
        digest = seeded.copy()
        digest.update(path.encode())
        digests.append(digest.digest())
    order = np.lexsort((np.frombuffer(b"".join(digests), ">u8"), listing.classes))  # equal hashes: by path
    sizes = np.bincount(listing.classes, minlength=len(listing.class_names))
    wanted = np.floor(sizes * share + 0.5).astype(np.int64)
    if share > 0:
        wanted = np.where(sizes > 1, wanted.clip(1, np.maximum(sizes - 1, 1)), 0)
    place = np.arange(number) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of the image within its class
    chosen = np.zeros(number, bool)
    chosen[order] = place < np.repeat(wanted, sizes)
    return chosen
