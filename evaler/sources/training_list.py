"""List files of training, one `path label` a line, as images to extract and as labels to score by."""

import os
import re
from pathlib import Path

import numpy as np

from datasets.images.decode import ImageError
from datasets.landmark import read_list
from evaler.sources.image_list import LooseFiles
from evaler.sources.image_names import checked_name, first_double

_LABELLED = re.compile(rb"\s*\S.*\s[+-]?[0-9]+\s*")


def is_training_list(path: Path) -> bool:
    """Whether every line ends with a whole number behind white space, and the first is not itself a file's name."""
    first = b""
    with open(path, "rb") as file:
        for line in file:
            if line.strip() and not _LABELLED.fullmatch(line.rstrip(b"\r\n")):
                return False
            first = first or line.strip()
    return bool(first) and b"\0" not in first and not os.path.lexists(os.path.join(os.fsencode(path.parent), first))


def read_training_list(path: Path) -> tuple[list[str], LooseFiles, np.ndarray]:
    """Names, files and labels (int64 [N]) of a list, which is read as training does.

    An image below the list's folder is named by its path relative to that folder, any other by its absolute path
    without the first slash: lists of one data set name an image alike. Raises `ListError` or `ImageError`, naming the
    line, for a line that is none, an image that comes twice, and a name that cannot be written down.
    """
    folder = os.path.abspath(path.parent)
    paths, labels = read_list(path, root=folder)
    names = []
    inside = f"{folder.rstrip('/')}/"
    for number, place in enumerate(paths, start=1):
        try:
            if "\0" not in place:  # where normpath would cut it off
                place = os.path.realpath(place) if ".." in place.split("/") else os.path.normpath(place)
            names.append(checked_name(place.removeprefix(inside).lstrip("/")))
        except ValueError as error:
            raise ImageError(f"{path}, line {number}: {place[:200]!a} {error}") from None
        paths[number - 1] = place
    double = first_double(names)
    if double is not None:
        first, second = double
        raise ImageError(f"{path}: {names[first]} stands in line {first + 1} and again in line {second + 1}")
    elsewhere = np.fromiter((not place.startswith(inside) for place in paths), bool, len(paths))
    return names, _Listed(folder, names, elsewhere), labels


class _Listed(LooseFiles):
    """Image `name` is FOLDER/name, or /name where `elsewhere` (bool [N]) is set."""

    def __init__(self, folder: str, names: list[str], elsewhere: np.ndarray) -> None:
        super().__init__(folder, names)
        self._elsewhere = elsewhere

    def source(self, index: int) -> str:
        return f"/{self._names[index]}" if self._elsewhere[index] else super().source(index)
