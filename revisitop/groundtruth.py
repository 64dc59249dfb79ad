"""The ground truth of a retrieval set in the Revisited format, read without trusting the file.

A file `gnd_<name>.pkl` is a pickled dict: `imlist` and `qimlist`, the names of the database images and of the queries
(without extension), and `gnd`, one dict a query: `bbx` (x1, y1, x2, y2 in pixels of the query, or None for the whole
picture) and `easy`, `hard`, `junk`, lists of indices into `imlist`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from revisitop import plain_pickle
from revisitop.errors import ProtocolError

LABELS = ("easy", "hard", "junk")
# sha256 of the files at http://cmp.felk.cvut.cz/revisitop/data/datasets/
OFFICIAL_SHA256 = {
    "roxford5k": "ba7967754bd2d7d2210a5799f9c45ad5835e269a80ef9d3eba44caa35816c471",
    "rparis6k": "d2e729a5293dda7dda8a15c8383424a42e4964a2c4cfea2f32fa85d11d2df499",
}
# Lists may be shared within a file, so a small file can stand for very many labels.
MAX_LABELS = 10**8
MAX_SIDE = 2**31  # pixels: NaN, infinity and integers that no float holds are larger


class GroundTruthError(ProtocolError):
    """A ground truth that cannot be used; the message is one line."""


def path_of(data_dir: str | os.PathLike, name: str) -> Path:
    """Where the ground truth of a set lies."""
    return Path(data_dir) / name / f"gnd_{name}.pkl"


@dataclass(frozen=True, eq=False)
class Query:
    """bbx: x1, y1, x2, y2 in pixels, None for the whole picture; easy, hard, junk: int64 indices into imlist."""

    bbx: tuple[float, float, float, float] | None
    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Names of the database images and of the queries, and the labels of each query in the order of `qimlist`."""

    imlist: tuple[str, ...]
    qimlist: tuple[str, ...]
    gnd: tuple[Query, ...]


def load(path: str | os.PathLike) -> GroundTruth:
    """Read and check a ground-truth file; nothing in it is executed.

    Raises `GroundTruthError` naming the file, and the query where one is at fault: a file that is missing, is not a
    pickle or holds more than plain data; missing keys, wrong types, counts that differ, names doubled or unusable,
    indices out of range, doubled or under two labels, boxes that are not finite or hold no pixel.
    """
    path = Path(path)
    try:
        data = plain_pickle.loads(path.read_bytes())
    except FileNotFoundError:
        raise GroundTruthError(
            f"{path}: there is no ground truth; datasets/DATA.md says how to get the set and where it belongs"
        ) from None
    except (OSError, plain_pickle.PlainPickleError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise GroundTruthError(f"{path}: not a ground truth that can be read: {reason}") from None
    try:
        return _parse(data)
    except GroundTruthError as error:
        raise GroundTruthError(f"{path}: {error}") from None


def unlabelled_queries(truth: GroundTruth) -> list[str]:
    """Queries that stand in `imlist` too and are not labelled there for themselves: they are ranked first, as wrong."""
    index_of = {name: index for index, name in enumerate(truth.imlist)}
    return [
        name
        for name, query in zip(truth.qimlist, truth.gnd, strict=True)
        if name in index_of and not any(index_of[name] in getattr(query, label) for label in LABELS)
    ]


def _parse(data: Any) -> GroundTruth:
    if type(data) is not dict:
        raise GroundTruthError(f"a ground truth is a dict, this is a {type(data).__name__}")
    missing = [key for key in ("imlist", "qimlist", "gnd") if key not in data]
    if missing:
        raise GroundTruthError(f"lacks the key {' and '.join(missing)}")
    imlist, qimlist = (_parse_names(data[key], key) for key in ("imlist", "qimlist"))
    gnd = _as_list(data["gnd"], "gnd")
    if len(gnd) != len(qimlist):
        raise GroundTruthError(f"labels of {len(gnd)} queries in gnd, but {len(qimlist)} names in qimlist")
    budget = MAX_LABELS
    queries = []
    for index, (entry, name) in enumerate(zip(gnd, qimlist, strict=True)):
        try:
            queries.append(_parse_query(entry, len(imlist), budget))
        except GroundTruthError as error:
            raise GroundTruthError(f"query {index} ({name}): {error}") from None
        budget -= sum(len(getattr(queries[-1], label)) for label in LABELS)
    return GroundTruth(imlist, qimlist, tuple(queries))


def _parse_names(value: Any, key: str) -> tuple[str, ...]:
    names = _as_list(value, key)
    if not names:
        raise GroundTruthError(f"{key} is empty")
    for index, name in enumerate(names):
        if type(name) is not str:
            raise GroundTruthError(f"{key}[{index}] is not text but a {type(name).__name__}")
        # A name is joined to the folder of the images, and must not lead out of it.
        parts = PurePosixPath(name).parts
        if not parts or not name.isprintable() or parts[0] == "/" or ".." in parts:
            raise GroundTruthError(f"{key}[{index}] {name[:80]!a} cannot be the name of an image")
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise GroundTruthError(f"{key}[{index}] {name} is there twice")
        seen.add(name)
    return tuple(names)


def _parse_query(entry: Any, images: int, budget: int) -> Query:
    if type(entry) is not dict:
        raise GroundTruthError(f"its labels are not a dict but a {type(entry).__name__}")
    missing = [key for key in ("bbx", *LABELS) if key not in entry]
    if missing:
        raise GroundTruthError(f"lacks the key {' and '.join(missing)}")
    bbx = None if entry["bbx"] is None else _parse_box(entry["bbx"])
    lists = [_as_list(entry[label], label) for label in LABELS]
    if sum(map(len, lists)) > budget:
        raise GroundTruthError(f"the file holds more than {MAX_LABELS} labels up to here")
    label_of: dict[int, str] = {}
    for label, indices in zip(LABELS, lists, strict=True):
        for position, index in enumerate(indices):
            if type(index) is not int or not 0 <= index < images:
                raise GroundTruthError(f"{label}[{position}] is not an index into the {images} images of imlist")
            if index in label_of:
                raise GroundTruthError(f"image {index} is in {label} and already in {label_of[index]}")
            label_of[index] = label
    return Query(bbx, *(_frozen(indices) for indices in lists))


def _parse_box(value: Any) -> tuple[float, float, float, float]:
    box = _as_list(value, "bbx")
    if len(box) != 4 or not all(type(side) in (int, float) and abs(side) <= MAX_SIDE for side in box):
        raise GroundTruthError("bbx is not 4 numbers of pixels x1, y1, x2, y2 (or None for the whole picture)")
    x1, y1, x2, y2 = map(int, box)  # pictures are cropped at truncated coordinates
    if x1 < 0 or y1 < 0 or x2 <= x1 or y2 <= y1:
        raise GroundTruthError(f"bbx {x1, y1, x2, y2} holds no pixel or begins outside the picture")
    left, top, right, bottom = map(float, box)
    return left, top, right, bottom


def _as_list(value: Any, key: str) -> Sequence:
    if type(value) not in (list, tuple):
        raise GroundTruthError(f"{key} is not a list but a {type(value).__name__}")
    return value


def _frozen(indices: Sequence[int]) -> np.ndarray:
    array = np.array(indices, dtype=np.int64)
    array.setflags(write=False)
    return array
