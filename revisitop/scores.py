"""Scores of a database too large to hold: exact where it matters, by chunks, on all cores.

A score is the dot product of two descriptors in float64: products first, then NumPy's pairwise sum over the dimensions.
That does not depend on what else is computed beside it, so equal descriptors have equal scores wherever they lie. A
matrix product in float32 is many times faster and tells which scores have to be computed so: its error has a bound
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1: |error| <= D u / (1 - D u) |q| |x|,
whatever the order of the sum).
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

from revisitop.errors import ProtocolError

ROWS_A_CHUNK = 1 << 14
NUMBERS_AT_ONCE = 1 << 18  # of rows, that stay in a processor's cache from their lengths to their product
T = TypeVar("T")


class Rows(Protocol):
    """Descriptors [N, D] that are read in slices: an array, a memory-mapped one, or what makes them as it goes.

    Several threads read at once. What refines descriptors also reads by indices.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray: ...


def exact_scores(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The definition of a score: [W, D], and a query [D] or one for each row [W, D] -> float64 [W]."""
    return np.add.reduce(np.multiply(rows, query, dtype=np.float64, order="C"), axis=1)


def near_scores(
    queries: np.ndarray, rows: np.ndarray, start: int, *, rough: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """[Q, D], [C, D] -> scores [Q, C] by a matrix product, and by how much those of each query may be off [Q].

    In float32, which holds float16 and float32 exactly, where that has room for the products; else in float64. `start`
    is the index of the first row, for messages. rough: in less time, by a bound up to 30 times as wide; of few queries
    the product takes no longer than the lengths of the rows. Raises ProtocolError for a row that is not finite.
    """
    kind = np.float32 if max(_bytes(rows), _bytes(queries)) <= 4 else np.float64
    asked, (count, dim) = queries.astype(kind), rows.shape
    scores, squares = np.empty((len(queries), count), kind), []
    size = max(1, NUMBERS_AT_ONCE // max(1, dim))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for first in range(0, count, size):
            block = np.ascontiguousarray(rows[first : first + size], dtype=kind)
            if rough:
                squares.append(np.dot(block.ravel(), block.ravel()))
            else:
                squares.append(np.einsum("nd,nd->n", block, block).max())
            np.matmul(asked, block.T, out=scores[:, first : first + size])
    largest = float(np.max(squares))  # also of NaN
    limits = np.finfo(kind)
    bound, bound_of_sum = (n * float(limits.eps) / 2 for n in (dim, dim * size if rough else dim))
    bound, bound_of_sum = bound / max(1e-3, 1 - bound), bound_of_sum / max(1e-3, 1 - bound_of_sum)
    longest = np.sqrt(largest) * (1 + 2 * bound_of_sum)
    lengths = np.sqrt(np.square(queries.astype(np.float64)).sum(axis=1))
    finite = longest * lengths.max(initial=1.0) < limits.max / 10  # then so are all products and their sums
    if not finite and not np.isfinite(rows).all():
        raise ProtocolError(f"the descriptor of database image {start + first_bad(rows)} is not finite")
    if kind is np.float32 and not (finite and largest > 1e-20):
        return near_scores(queries, rows.astype(np.float64), start, rough=rough)
    if not finite:
        raise ProtocolError("products of descriptors are not finite: they are too long")
    return scores, bound * lengths * longest + dim * float(limits.tiny)  # the latter where products vanish


def by_chunks(work: Callable[[Iterator[slice]], T], count: int, *, size: int, bar: tqdm) -> list[T]:
    """Call `work` in a thread for each core with its share of the slices of `range(count)`; what the calls return.

    Each takes the next slice when it has done one, so that a share ascends.

    An error in one of them, or Ctrl-C, ends the others at their next slice.
    """
    starts, ended = range(0, count, size), threading.Event()
    waiting, taking = iter(starts), threading.Lock()
    threads = max(1, min(cores(), len(starts)))

    def share() -> Iterator[slice]:
        while not ended.is_set():
            with taking:
                start = next(waiting, None)
            if start is None:
                return
            rows = slice(start, min(start + size, count))
            yield rows
            bar.update(rows.stop - rows.start)

    # BLAS's own threads would keep the cores busy waiting for one another between the products.
    with _libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(lambda _: work(share()), range(threads)))
        finally:
            ended.set()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _libraries() -> ThreadpoolController:
    """NumPy's among them. To look for them takes a millisecond."""
    return ThreadpoolController()


def first_bad(rows: np.ndarray) -> int:
    """The first of rows [N, D] that is not finite."""
    return int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])


def _bytes(rows: np.ndarray) -> int:
    """Of a number; whole numbers count as float64."""
    return rows.dtype.itemsize if rows.dtype.kind == "f" else 8
