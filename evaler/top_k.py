"""The k images of a database that are most like each query: exact, in one pass, the database read in chunks."""

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from core.counter import bar
from revisitop.scores import ROWS_A_CHUNK, Rows, by_chunks, exact_scores, first_bad, near_scores

EXACT_AT_ONCE = 1024  # rows that are copied to float64
QUERIES_AT_ONCE = 256  # whose scores of a chunk are held: 16 MB a thread
QUERIES_A_PASS = 8192  # whose best images are held by each thread while the database is read once


def top_k(
    queries: np.ndarray, database: Rows, k: int, *, exclude: Sequence[int] | None = None, shown: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 [Q, K] and indices int64 [Q, K] of the K = min(k, N) images with the highest dot products.

    queries: [Q, D]; database: [N, D], possibly memory-mapped. Memory does not grow with N, and with Q only what is
    returned; the database is read once for every 8192 queries.
    exclude: of each query an image (its own, -1 for none) that is not to be found; K is then at most N - 1.
    From the highest score to the lowest, equal ones by the smaller index. They are compared as float64
    (`revisitop.scores`), so that neither chunks nor threads change the result.
    Raises ValueError where shapes do not fit or a descriptor is not finite.
    """
    queries = np.asarray(queries)
    if queries.ndim != 2 or len(database.shape) != 2 or queries.shape[1] != database.shape[1]:
        raise ValueError(f"queries {queries.shape} and database {database.shape} are not [Q, D] and [N, D]")
    if k < 1:
        raise ValueError(f"the number of images to find is {k}, it must be at least 1")
    if not np.isfinite(queries).all():
        raise ValueError(f"the descriptor of query {first_bad(queries)} is not finite")
    count = database.shape[0]
    own = [-1] * len(queries) if exclude is None else [int(image) for image in exclude]
    k = max(0, min(k, count - any(image >= 0 for image in own)))

    scores, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    passes = [slice(first, first + QUERIES_A_PASS) for first in range(0, len(queries), QUERIES_A_PASS)] if k else []
    total = count * len(passes)
    with bar(None, "searching", unit="image", total=total, delay=1, leave=False, disable=not shown) as progress:
        for some in passes:
            found = _search(queries[some], database, k, own[some], progress)
            scores[some], indices[some] = [best.scores for best in found], [best.indices for best in found]
    return scores, indices


def _search(queries: np.ndarray, database: Rows, k: int, own: Sequence[int], progress: tqdm) -> "list[_Best]":
    blocks = [slice(first, first + QUERIES_AT_ONCE) for first in range(0, len(queries), QUERIES_AT_ONCE)]

    def share(slices: Iterator[slice]) -> list[_Best]:
        found = [_Best(query, k, image) for query, image in zip(queries, own, strict=True)]
        for rows in slices:
            chunk = np.asarray(database[rows])
            for some in blocks:
                for best, near, margin in zip(found[some], *near_scores(queries[some], chunk, rows.start), strict=True):
                    best.add(rows.start, chunk, near, margin)
        return found

    shares = by_chunks(share, database.shape[0], size=ROWS_A_CHUNK, bar=progress)
    for first, *others in zip(*shares, strict=True):
        for best in others:
            first.merge(best.scores, best.indices)
    return shares[0]


class _Best:
    """The k best images of a query so far: scores float64 and indices, best first."""

    def __init__(self, query: np.ndarray, k: int, own: int) -> None:
        self._query, self._k, self._own = query, k, own
        self.scores, self.indices = np.empty(0), np.empty(0, np.int64)

    def add(self, start: int, rows: np.ndarray, near: np.ndarray, margin: float) -> None:
        """Take in images `start` and following: rows [C, D], scores [C] that are `margin` off at most."""
        candidates = np.flatnonzero(near >= self._least(near, margin) - margin)
        candidates = candidates[candidates != self._own - start]
        for first in range(0, len(candidates), EXACT_AT_ONCE):
            some = candidates[first : first + EXACT_AT_ONCE]
            self.merge(exact_scores(rows[some], self._query), some + start)

    def _least(self, near: np.ndarray, margin: float) -> float:
        """A score that the k-th best has at least: the k-th's so far, or what k of this chunk have for certain."""
        if len(self.scores) == self._k:
            return self.scores[-1]
        if len(near) <= self._k + 1:
            return -np.inf
        # One more than k are looked at, since one of them may be the image that is left out.
        return np.partition(near, -self._k - 1)[-self._k - 1] - margin

    def merge(self, scores: np.ndarray, indices: np.ndarray) -> None:
        scores, indices = np.concatenate([self.scores, scores]), np.concatenate([self.indices, indices])
        order = np.lexsort((indices, -scores))[: self._k]
        self.scores, self.indices = scores[order], indices[order]
