"""The k images of a database that are most like each query: exact, in one pass, the database read in chunks."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from core.counter import bar

ROWS_A_CHUNK = 1 << 14


def top_k(
    queries: np.ndarray, database: np.ndarray, k: int, *, exclude: Sequence[int] | None = None, shown: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 [Q, K] and indices int64 [Q, K] of the K = min(k, N) images with the highest dot products.

    queries: [Q, D]; database: float32 or float16 [N, D], possibly memory-mapped. Memory does not grow with N, unless
    more and more images tie for the k-th place: those are all held and compared at the end.
    exclude: of each query an image (its own, -1 for none) that is not to be found; K is then at most N - 1.
    From the highest score to the lowest, equal ones by the smaller index. Scores are float64 sums (NumPy's pairwise
    ones) of the k that float32 products and their error bound leave, so that neither chunks nor threads change them.
    Raises ValueError where shapes do not fit or a descriptor is not finite.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise ValueError(f"queries {queries.shape} and database {database.shape} are not [Q, D] and [N, D]")
    if k < 1:
        raise ValueError(f"the number of images to find is {k}, it must be at least 1")
    if not np.isfinite(queries).all():
        raise ValueError(
            f"the descriptor of query {int(np.flatnonzero(~np.isfinite(queries).all(axis=1))[0])} is not finite"
        )
    count = len(database)
    own = np.full(len(queries), -1) if exclude is None else np.asarray(exclude, dtype=np.int64)
    assert own.shape == (len(queries),), own.shape
    k = min(k, count - bool((own >= 0).any()))
    if not k or not len(queries):
        return np.zeros((len(queries), max(k, 0)), np.float32), np.zeros((len(queries), max(k, 0)), np.int64)
    starts, ended = range(0, count, ROWS_A_CHUNK), threading.Event()
    threads = min(len(os.sched_getaffinity(0)), len(starts))
    with (
        threadpool_limits(1, user_api="blas"),  # its own threads would wait for one another between the products
        ThreadPoolExecutor(threads) as pool,
        bar(None, "searching", unit="image", total=count, delay=1, leave=False, disable=not shown) as progress,
    ):

        def search(first: int) -> list[_Best]:
            best = [_Best(k, int(image)) for image in own]
            for start in starts[first::threads]:
                if ended.is_set():
                    break
                rows = np.ascontiguousarray(database[start : start + ROWS_A_CHUNK], dtype=np.float32)
                _search(queries, rows, start, best)
                progress.update(len(rows))
            return best

        try:
            shares = list(pool.map(search, range(threads)))
        finally:
            ended.set()  # after an error or Ctrl-C the other threads stop as well
    scores, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for number, of_one in enumerate(zip(*shares, strict=True)):
        candidates = np.unique(np.concatenate([best.candidates() for best in of_one]))
        exact = np.add.reduce(
            np.asarray(database[candidates], dtype=np.float64) * queries[number].astype(np.float64), axis=1
        )
        order = np.lexsort((candidates, -exact))[:k]
        scores[number], indices[number] = exact[order], candidates[order]
    return scores, indices


class _Best:
    """The images of a query that may be among its k best: those within the error of the k-th best seen."""

    def __init__(self, k: int, own: int) -> None:
        self._k, self._own = k, own
        self._scores, self._indices = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        self._held, self._least, self._margin = 0, -np.inf, 0.0

    def add(self, start: int, scores: np.ndarray, margin: float) -> None:
        """Scores [C] of the images `start` and following, each at most `margin` off."""
        self._margin = max(self._margin, margin)
        near = np.flatnonzero(scores >= self._least - 2 * self._margin)
        if 0 <= self._own - start < len(scores):
            near = near[near != self._own - start]
        self._scores.append(scores[near])
        self._indices.append(near + start)
        self._held += len(near)
        if self._held > 4 * self._k + 1024:
            self._reduce()

    def _reduce(self) -> None:
        scores, indices = np.concatenate(self._scores), np.concatenate(self._indices)
        if len(scores) > self._k:
            self._least = float(np.partition(scores, len(scores) - self._k)[len(scores) - self._k])
            near = scores >= self._least - 2 * self._margin
            scores, indices = scores[near], indices[near]
        self._scores, self._indices, self._held = [scores], [indices], 0

    def candidates(self) -> np.ndarray:
        self._reduce()
        return self._indices[0]


def _search(queries: np.ndarray, rows: np.ndarray, start: int, best: list[_Best]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("nd,nd->n", rows, rows)
        scores = queries @ rows.T
    if not (np.isfinite(squares).all() and np.isfinite(scores).all()):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        what = (
            f"the descriptor of database image {start + int(bad[0])} is" if len(bad) else "products of descriptors are"
        )
        raise ValueError(f"{what} not finite")
    dim = rows.shape[1]
    bound = dim * 2.0**-24 / (1 - dim * 2.0**-24)  # as in revisitop/streamed_ranks.py
    longest = np.sqrt(float(squares.max())) * (1 + 2 * bound)
    lengths = np.sqrt(np.square(queries.astype(np.float64)).sum(axis=1))
    for query, row, margin in zip(best, scores, bound * lengths * longest + dim * 2.0**-126, strict=True):
        query.add(start, row, float(margin))
