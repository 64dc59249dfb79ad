"""Where given images stand in the ranking of a database that is read once, in chunks, and never sorted.

An image's score is the dot product with the query, in float64: products first, then NumPy's pairwise sum over the
dimensions. That does not depend on what else is computed beside it, so equal descriptors have equal scores wherever
they lie. Only scores that float32 cannot tell from one of interest are computed so; for the others a matrix product in
float32 is enough, whose error has a bound (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section
3.1: |error| <= D u / (1 - D u) |q| |x|, whatever the order of the sum).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

ROWS_A_CHUNK = 1 << 14


class Rows(Protocol):
    """Descriptors [N, D] that are read in slices: an array, a memory-mapped one, or what makes them as it goes."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Standing:
    """Of W images in the ranking of one query, each int64 [W].

    above: how many images have a higher score. before: how many of equal score have a smaller index.
    equal: how many have an equal score, the image itself counted.
    """

    above: np.ndarray
    before: np.ndarray
    equal: np.ndarray

    @property
    def ranks(self) -> np.ndarray:
        """From 0: higher scores first, equal ones by the smaller index."""
        return self.above + self.before


def standings(
    queries: np.ndarray, parts: Sequence[Rows], wanted: Sequence[np.ndarray], *, rows_a_chunk: int = ROWS_A_CHUNK
) -> list[Standing]:
    """Where the images `wanted[q]` (indices [W]) stand for query q of [Q, D]; a list of Q.

    The database is the `parts` one after another. Memory: a chunk, its scores, and a few numbers for each wanted image.
    Raises ValueError where a descriptor or a score is not finite.
    """
    queries = np.asarray(queries)
    if not np.isfinite(queries).all():
        raise ValueError(f"the descriptor of query {_first_bad(queries)} is not finite")
    # Float32 holds float16 and float32 exactly; what else there is is compared in float64.
    exact = [query.astype(np.float64) for query in queries]
    found = [
        _Query(query, _scores(_gathered(parts, images), query), images)
        for query, images in zip(exact, wanted, strict=True)
    ]
    length = sum(part.shape[0] for part in parts)
    with tqdm(total=length, desc="ranking", unit="image", unit_scale=True, leave=False, delay=1) as bar:
        for start, rows in _chunks(parts, rows_a_chunk):
            kind = np.float32 if max(_bytes(rows), _bytes(queries)) <= 4 else np.float64
            rows = np.ascontiguousarray(rows, dtype=kind)
            scores, margins = _product(queries.astype(kind), rows, start)
            for query, row, margin in zip(found, scores, margins, strict=True):
                query.count(start, rows, row, margin)
            bar.update(len(rows))
    return [query.standing() for query in found]


class _Query:
    """The wanted images of a query by ascending score, and how many of the images seen lie above and beside each."""

    def __init__(self, vector: np.ndarray, scores: np.ndarray, images: np.ndarray) -> None:
        self._vector, self._order = vector, np.argsort(scores, kind="stable")
        self._thresholds, self._images = scores[self._order], np.asarray(images)[self._order]
        # above[k]: images that are higher than exactly k of the wanted ones
        self._above = np.zeros(len(scores) + 1, dtype=np.int64)
        self._before, self._equal = np.zeros((2, len(scores)), dtype=np.int64)

    def count(self, start: int, rows: np.ndarray, scores: np.ndarray, margin: float) -> None:
        """Take in images `start` and following: rows [C, D], scores [C] that are `margin` off at most."""
        if not len(self._thresholds):
            return
        near = np.flatnonzero(scores >= self._thresholds[0] - margin)
        values = scores[near].astype(np.float64)
        least = np.searchsorted(self._thresholds + margin, values, side="left")
        most = np.searchsorted(self._thresholds - margin, values, side="right")
        sure = least == most
        self._add(least[sure])
        for index in _pieces(near[~sure]):
            values = _scores(rows[index], self._vector)
            below, upto = (np.searchsorted(self._thresholds, values, side=side) for side in ("left", "right"))
            self._add(below)
            for row, first, end in zip(index[below < upto], below[below < upto], upto[below < upto], strict=True):
                self._equal[first:end] += 1
                self._before[first:end] += start + row < self._images[first:end]

    def _add(self, higher_than: np.ndarray) -> None:
        self._above += np.bincount(higher_than, minlength=len(self._above))

    def standing(self) -> Standing:
        above = np.cumsum(self._above[::-1])[::-1][1:]  # above the k-th: higher than k + 1 of them or more
        back = np.empty_like(self._order)
        back[self._order] = np.arange(len(back))
        return Standing(above[back], self._before[back], self._equal[back])


def _scores(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The definition of a score: [W, D], float64 [D] -> float64 [W]."""
    return np.add.reduce(np.ascontiguousarray(rows, dtype=np.float64) * query, axis=1)


def _pieces(index: np.ndarray) -> Iterator[np.ndarray]:
    """Few rows at a time, for they are copied to float64."""
    for start in range(0, len(index), 1024):
        yield index[start : start + 1024]


def _product(queries: np.ndarray, rows: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [Q, C] by a matrix product, and by how much those of each query may be off [Q]."""
    dim, unit = rows.shape[1], float(np.finfo(rows.dtype).eps)  # 2 u: twice the bound, for what is left out in it
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("nd,nd->n", rows, rows)
        scores = queries @ rows.T
    finite = np.isfinite(squares).all() and np.isfinite(scores).all()
    if not finite and not np.isfinite(rows).all():
        raise ValueError(f"the descriptor of database image {start + _first_bad(rows)} is not finite")
    if rows.dtype == np.float32 and not (finite and squares.max() > 1e-20):  # float32 has no room for the products
        return _product(queries.astype(np.float64), rows.astype(np.float64), start)
    if not finite:
        raise ValueError("products of descriptors are not finite: they are too long")
    longest = np.sqrt(float(squares.max())) * (1 + dim * unit)
    lengths = np.sqrt(np.square(queries.astype(np.float64)).sum(axis=1))
    return scores, dim * unit * lengths * longest + dim * float(np.finfo(rows.dtype).tiny)  # where products vanish


def _chunks(parts: Sequence[Rows], size: int) -> Iterator[tuple[int, np.ndarray]]:
    first = 0
    for part in parts:
        for start in range(0, part.shape[0], size):
            yield first + start, np.asarray(part[start : start + size])
        first += part.shape[0]


def _gathered(parts: Sequence[Rows], images: np.ndarray) -> np.ndarray:
    """The descriptors of these images: float64 [W, D]."""
    ends = np.cumsum([part.shape[0] for part in parts])
    rows = np.empty((len(images), parts[0].shape[1]))
    for row, (image, which) in enumerate(zip(images, np.searchsorted(ends, images, side="right"), strict=True)):
        local = int(image - ends[which] + parts[which].shape[0])
        rows[row] = np.asarray(parts[which][local : local + 1])[0]
    return rows


def _bytes(rows: np.ndarray) -> int:
    """Of a number; whole numbers count as float64."""
    return rows.dtype.itemsize if rows.dtype.kind == "f" else 8


def _first_bad(rows: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
