"""Where given images stand in the ranking of a database that is read in chunks and never sorted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from revisitop.errors import ProtocolError
from revisitop.scores import ROWS_A_CHUNK, Rows, by_chunks, exact_scores, first_bad, near_scores


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
    queries: np.ndarray, database: Rows, wanted: Sequence[np.ndarray], *, rows_a_chunk: int = ROWS_A_CHUNK
) -> list[Standing]:
    """Where the images `wanted[q]` (indices [W]) of a database [N, D] stand for query q of [Q, D]; a list of Q.

    Memory: for each core a chunk, its scores, and a few numbers for each wanted image; the descriptors of those once.
    Raises ProtocolError where a descriptor or a score is not finite.
    """
    queries, count = np.asarray(queries), database.shape[0]
    if not np.isfinite(queries).all():
        raise ProtocolError(f"the descriptor of query {first_bad(queries)} is not finite")
    all_wanted = np.unique(np.concatenate([np.empty(0, np.int64), *wanted]))

    def gather(slices: Iterator[slice]) -> dict[int, np.ndarray]:
        # In the same chunks as later: what makes descriptors as it goes may round a row alone in another way.
        chunks_readread: dict[int, np.ndarray] = {}
        for rows in slices:
            inside = all_wanted[slice(*np.searchsorted(all_wanted, (rows.start, rows.stop)))]
            if len(inside):
                chunks_readread.update(
                    zip(inside.tolist(), np.asarray(database[rows])[inside - rows.start], strict=True)
                )
        return chunks_readread

    def count_chunks(slices: Iterator[slice]) -> list[_Query]:
        chunks_readers = [_Query(*query) for query in zip(queries, scores, wanted, strict=True)]
        for rows in slices:
            chunk = np.asarray(database[rows])
            for query, near, margin in zip(chunks_readers, *near_scores(queries, chunk, rows.start), strict=True):
                query.count(rows.start, chunk, near, margin)
        return chunks_readers

    with tqdm(desc="ranking", total=count, unit="image", unit_scale=True, leave=False, delay=1) as bar:
        row_of: dict[int, np.ndarray] = {}
        for share in by_chunks(gather, count, size=rows_a_chunk, bar=tqdm(disable=True)):
            row_of |= share
        scores = [
            exact_scores(np.array([row_of[i] for i in images.tolist()]).reshape(-1, database.shape[1]), query)
            for query, images in zip(queries, wanted, strict=True)
        ]
        shares = by_chunks(count_chunks, count, size=rows_a_chunk, bar=bar)
    return [_Query.standing(of_one) for of_one in zip(*shares, strict=True)]


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
        scores = exact_scores(rows[index], self._vector)
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
