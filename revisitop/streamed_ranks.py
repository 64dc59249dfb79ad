"""Where given images stand in the ranking of a database that is read once, in chunks, and never sorted.

An image's score is the dot product with the query, in float64: products first, then NumPy's pairwise sum over the
dimensions. That does not depend on what else is computed beside it, so equal descriptors have equal scores wherever
they lie. Only scores that float32 cannot tell from one of interest are computed so; for the others a matrix product in
float32 is enough, whose error has a bound (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section
3.1: |error| <= D u / (1 - D u) |q| |x|, whatever the order of the sum).
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

ROWS_A_CHUNK = 1 << 14


class Rows(Protocol):
    """Descriptors [N, D] that are read in slices: an array, a memory-mapped one, or what makes them as it goes.

    Several threads read at once.
    """

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

    The database is the `parts` one after another; a thread for each core reads them. Memory: for each thread a chunk,
    its scores, and a few numbers for each wanted image. Raises ValueError where a descriptor or a score is not finite.
    """
    queries = np.asarray(queries)
    if not np.isfinite(queries).all():
        raise ValueError(f"the descriptor of query {_first_bad(queries)} is not finite")
    exact = [query.astype(np.float64) for query in queries]
    pieces = list(_pieces(parts, rows_a_chunk))
    threads = min(_cores(), len(pieces)) or 1
    total, ended = sum(part.shape[0] for part in parts), threading.Event()
    with (
        threadpool_limits(1, user_api="blas"),  # its own threads would wait for one another between the products
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc="ranking", unit="image", unit_scale=True, leave=False, delay=1) as bar,
    ):
        scores = _wanted_scores(exact, pieces, wanted)

        def count(first: int) -> list[_Query]:
            found = [_Query(*query) for query in zip(exact, scores, wanted, strict=True)]
            for start, part, rows in pieces[first::threads]:
                if ended.is_set():
                    break
                _count(queries, np.asarray(part[rows]), start, found)
                bar.update(rows.stop - rows.start)
            return found

        try:
            shares = list(pool.map(count, range(threads)))
        finally:
            ended.set()  # after an error or Ctrl-C the other threads stop as well
    return [_Query.standing(of_one) for of_one in zip(*shares, strict=True)]


def _count(queries: np.ndarray, rows: np.ndarray, start: int, found: list["_Query"]) -> None:
    """Take in images `start` and following."""
    # Float32 holds float16 and float32 exactly; what else there is is compared in float64.
    kind = np.float32 if max(_bytes(rows), _bytes(queries)) <= 4 else np.float64
    rows = np.ascontiguousarray(rows, dtype=kind)
    scores, margins = _product(queries.astype(kind), rows, start)
    for query, row, margin in zip(found, scores, margins, strict=True):
        query.count(start, rows, row, margin)


class _Query:
    """The wanted images of a query by ascending score, and how many of the images seen lie above and beside each."""

    def __init__(self, vector: np.ndarray, scores: np.ndarray, images: np.ndarray) -> None:
        self._vector, self._order = vector, np.argsort(scores, kind="stable")
        self._thresholds, self._images = scores[self._order], np.asarray(images)[self._order]
        # above[k]: images that are higher than exactly k of the wanted ones
        self._above = np.zeros(len(scores) + 1, dtype=np.int64)
        self._before, self._equal = np.zeros((2, len(scores)), dtype=np.int64)
        self._margin = -1.0

    def count(self, start: int, rows: np.ndarray, scores: np.ndarray, margin: float) -> None:
        """Take in images `start` and following: rows [C, D], scores [C] that are `margin` off at most."""
        if not len(self._thresholds):
            return
        if margin > self._margin or scores.dtype != self._edges.dtype:
            self._widen(margin, scores.dtype)
        candidates = np.flatnonzero(scores >= self._edges[0])
        place = np.searchsorted(self._edges, scores[candidates], side="right")
        self._above += np.bincount(self._higher_than[place], weights=1 - place % 2, minlength=len(self._above)).astype(
            np.int64
        )
        unsure = candidates[place % 2 == 1]
        for first in range(0, len(unsure), 1024):  # few at a time, for they are copied to float64
            self._count_exactly(start, rows, unsure[first : first + 1024])

    def _widen(self, margin: float, kind: np.dtype) -> None:
        """Around the thresholds lie intervals, in which a score has to be computed anew; those that meet are one.

        edges: where intervals begin and end, in turn. higher_than: of how many thresholds a score between them is.
        """
        self._margin = 1.01 * margin
        low, high = self._thresholds - self._margin, self._thresholds + self._margin
        last = np.append(np.flatnonzero(low[1:] > high[:-1]), len(low) - 1)  # of the thresholds in each interval
        first = np.append(0, last[:-1] + 1)
        edges = np.stack([low[first].astype(kind), high[last].astype(kind)], axis=1)
        edges[:, 0] = np.nextafter(edges[:, 0], kind.type(-np.inf))  # rounding must not make them narrower
        edges[:, 1] = np.nextafter(edges[:, 1], kind.type(np.inf))
        self._edges = np.maximum.accumulate(edges.ravel())
        self._higher_than = np.append(0, np.repeat(last + 1, 2))

    def _count_exactly(self, start: int, rows: np.ndarray, index: np.ndarray) -> None:
        scores = _scores(rows[index], self._vector)
        below, upto = (np.searchsorted(self._thresholds, scores, side=side) for side in ("left", "right"))
        self._above += np.bincount(below, minlength=len(self._above))
        tied = below < upto
        for row, first, end in zip(index[tied], below[tied], upto[tied], strict=True):
            self._equal[first:end] += 1
            self._before[first:end] += start + row < self._images[first:end]

    @staticmethod
    def standing(shares: Sequence["_Query"]) -> Standing:
        """Of one query, from what each thread has counted."""
        above, before, equal = (
            sum(getattr(share, name) for share in shares) for name in ("_above", "_before", "_equal")
        )
        above = np.cumsum(above[::-1])[::-1][1:]  # above the k-th: higher than k + 1 of them or more
        order = shares[0]._order
        back = np.empty_like(order)
        back[order] = np.arange(len(back))
        return Standing(above[back], before[back], equal[back])


def _scores(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The definition of a score: [W, D], float64 [D] -> float64 [W]."""
    return np.add.reduce(np.ascontiguousarray(rows, dtype=np.float64) * query, axis=1)


def _product(queries: np.ndarray, rows: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [Q, C] by a matrix product, and by how much those of each query may be off [Q]."""
    dim, unit = rows.shape[1], float(np.finfo(rows.dtype).eps) / 2
    bound = dim * unit / max(1e-3, 1 - dim * unit)
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
    longest = np.sqrt(float(squares.max())) * (1 + 2 * bound)
    lengths = np.sqrt(np.square(queries.astype(np.float64)).sum(axis=1))
    return scores, bound * lengths * longest + dim * float(np.finfo(rows.dtype).tiny)  # where products vanish


def _pieces(parts: Sequence[Rows], size: int) -> Iterator[tuple[int, Rows, slice]]:
    """Chunks of the database: the index of the first image, and where the rows are."""
    first = 0
    for part in parts:
        for start in range(0, part.shape[0], size):
            yield first + start, part, slice(start, min(start + size, part.shape[0]))
        first += part.shape[0]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wanted_scores(
    queries: Sequence[np.ndarray], pieces: Sequence[tuple[int, Rows, slice]], wanted: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Of each query the scores of its wanted images.

    Read in the same chunks as later: what makes descriptors as it goes may round a single row in another way.
    """
    images = np.unique(np.concatenate([np.empty(0, np.int64), *wanted]))
    found = []
    for start, part, rows in pieces:
        inside = images[(images >= start) & (images < start + rows.stop - rows.start)]
        if len(inside):
            found.append(np.asarray(part[rows])[inside - start])
    gathered = np.concatenate(found) if found else np.empty((0, 0))
    return [
        _scores(gathered[np.searchsorted(images, of_one)], query) if len(of_one) else np.empty(0)
        for query, of_one in zip(queries, wanted, strict=True)
    ]


def _bytes(rows: np.ndarray) -> int:
    """Of a number; whole numbers count as float64."""
    return rows.dtype.itemsize if rows.dtype.kind == "f" else 8


def _first_bad(rows: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
