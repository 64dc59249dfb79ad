"""The k images of a database that are most like each query: exact, in one pass, the database read in chunks."""

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from core.base.errors import UserError
from core.base.progress import bar
from revisitop.scores import ROWS_A_CHUNK, Rows, by_chunks, cores, exact_scores, first_bad, near_scores

EXACT_AT_ONCE = 256  # rows that are copied to float64
PAIRS_AT_ONCE = 1 << 16  # of a query and an image that may be one of its best; a chunk's rows at least
QUERIES_AT_ONCE = 256  # whose scores of a chunk are held: 16 MB a thread
QUERIES_A_PASS = 8192  # whose best images are held by each thread while the database is read once
FEW = 8  # queries, of which the product takes no longer than a close bound of its error
FEWEST = 1024  # rows a chunk at least, where an array is cut into smaller ones for all cores
NONE = np.iinfo(np.int64).max  # the index of no image


def top_k(
    queries: np.ndarray,
    database: Rows,
    k: int,
    *,
    exclude: Sequence[int] | np.ndarray | None = None,
    shown: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 [Q, K] and indices int64 [Q, K] of the K = min(k, N) images with the highest dot products.

    queries: [Q, D]; database: [N, D], possibly memory-mapped. Memory does not grow with N, and with Q only what is
    returned; the database is read once for every 8192 queries.
    exclude: of each query an image (its own, -1 for none) that is not to be found; K is then at most N - 1.
    From the highest score to the lowest, equal ones by the smaller index. They are compared as float64
    (`revisitop.scores`), so that neither chunks nor threads change the result.
    Raises UserError where shapes do not fit or a descriptor is not finite.
    """
    queries = np.asarray(queries)
    if queries.ndim != 2 or len(database.shape) != 2 or queries.shape[1] != database.shape[1]:
        raise UserError(f"queries {queries.shape} and database {database.shape} are not [Q, D] and [N, D]")
    if k < 1:
        raise UserError(f"the number of images to find is {k}, it must be at least 1")
    if not np.isfinite(queries).all():
        raise UserError(f"the descriptor of query {first_bad(queries)} is not finite")
    count = database.shape[0]
    excluded = np.full(len(queries), -1) if exclude is None else np.array([int(image) for image in exclude], np.int64)
    k = max(0, min(k, count - bool((excluded >= 0).any())))

    scores, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    passes = [slice(first, first + QUERIES_A_PASS) for first in range(0, len(queries), QUERIES_A_PASS)] if k else []
    total = count * len(passes)
    with bar(None, "searching", unit="image", total=total, delay=1, leave=False, disable=not shown) as progress:
        for some in passes:
            scores[some], indices[some] = _search(queries[some], database, k, excluded[some], progress)
    return scores, indices


def _search(
    queries: np.ndarray, database: Rows, k: int, excluded: np.ndarray, progress: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    blocks = [slice(first, first + QUERIES_AT_ONCE) for first in range(0, len(queries), QUERIES_AT_ONCE)]
    least = np.full(len(queries), -np.inf)

    def share(slices: Iterator[slice]) -> list[_Best]:
        found = [_Best(queries[some], k, excluded[some], least[some]) for some in blocks]
        for rows in slices:
            chunk = np.asarray(database[rows])
            for some, best in zip(blocks, found, strict=True):
                near = near_scores(queries[some], chunk, rows.start, rough=len(queries) <= FEW)
                best.add(rows.start, chunk, *near)
        return found

    count, size = database.shape[0], ROWS_A_CHUNK
    if isinstance(database, np.ndarray):  # what makes rows as it goes may round them otherwise in other chunks
        chunks = cores() * -(-count // (cores() * size))
        size = min(size, max(FEWEST, 2 * k, -(-count // chunks)))
    shares = by_chunks(share, count, size=size, bar=progress)
    for block, *others in zip(*shares, strict=True):
        for other in others:
            block.merge(np.arange(len(other.scores)), other.scores, other.indices)
    return np.concatenate([best.scores for best in shares[0]]), np.concatenate([best.indices for best in shares[0]])


class _Best:
    """The k best images so far of each of some queries [B, D]: scores float64 and indices [B, k], best first.

    least: a score [B] that the k-th best of each has at least, which those that read other chunks raise as well. One
    may overwrite what another has just written: lower, and as true.
    """

    def __init__(self, queries: np.ndarray, k: int, excluded: np.ndarray, least: np.ndarray) -> None:
        self._queries, self._k, self._own, self._least = queries, k, excluded, least
        self.scores = np.full((len(queries), k), -np.inf)
        self.indices = np.full((len(queries), k), NONE)

    def add(self, start: int, rows: np.ndarray, near: np.ndarray, margin: np.ndarray) -> None:
        """Take in images `start` and following: rows [C, D], scores [B, C] that are `margin` [B] off at most."""
        new = np.flatnonzero(np.isneginf(self._least))
        if len(new) and near.shape[1] > self._k + 1:
            # What k of this chunk have for certain; one more is looked at, since one may be the query's own.
            kth = np.partition(near[new], -self._k - 1, axis=1)[:, -self._k - 1]
            self._least[new] = np.maximum(self._least[new], kth - margin[new])
        limits = (self._least - margin).astype(near.dtype)
        possible = near >= np.nextafter(limits, near.dtype.type(-np.inf))[:, None]  # rounding must not raise them
        affected = np.flatnonzero((self._own >= start) & (self._own < start + len(rows)))
        possible[affected, self._own[affected] - start] = False
        self._add(start, rows, possible, 0)

    def _add(self, start: int, rows: np.ndarray, possible: np.ndarray, first: int) -> None:
        """`possible` [B', C]: which of the rows may be among the best of query `first` and following."""
        counts = np.zeros(0, np.int64)
        if len(possible) == 1 or np.count_nonzero(possible) <= PAIRS_AT_ONCE:
            query, row = np.divmod(np.flatnonzero(possible), possible.shape[1])
            counts = np.bincount(query, minlength=len(possible))
        if len(possible) > 1 and (not len(counts) or len(possible) * counts.max() > 4 * PAIRS_AT_ONCE):
            half = len(possible) // 2
            self._add(start, rows, possible[:half], first)
            self._add(start, rows, possible[half:], first + half)
            return
        having = np.flatnonzero(counts)
        if not len(having):
            return
        shape, ends = (len(having), counts.max()), np.cumsum(counts[having])
        scores, indices = np.full(shape, -np.inf), np.full(shape, NONE)
        for at, end, asked in zip(range(len(having)), ends, self._queries[first + having], strict=True):
            mine = row[end - counts[having[at]] : end]
            indices[at, : len(mine)] = mine + start
            for some in range(0, len(mine), EXACT_AT_ONCE):
                few = mine[some : some + EXACT_AT_ONCE]
                scores[at, some : some + len(few)] = exact_scores(rows[few], asked)
        self.merge(first + having, scores, indices)

    def merge(self, which: np.ndarray, scores: np.ndarray, indices: np.ndarray) -> None:
        """Take in images [B', M] for the queries `which` [B']."""
        scores = np.concatenate([self.scores[which], scores], axis=1)
        indices = np.concatenate([self.indices[which], indices], axis=1)
        order = np.lexsort((indices, -scores), axis=1)[:, : self._k]
        self.scores[which] = np.take_along_axis(scores, order, 1)
        self.indices[which] = np.take_along_axis(indices, order, 1)
        self._least[which] = np.maximum(self._least[which], self.scores[which, -1])
