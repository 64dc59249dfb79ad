"""Scores of a database too large to hold: exact where it matters, by chunks, on all cores.

A score is the dot product of two descriptors in float64: products first, then NumPy's pairwise sum over the dimensions.
That does not depend on what else is computed beside it, so equal descriptors have equal scores wherever they lie. A
matrix product in float32 is many times faster and tells which scores have to be computed so: its error has a bound
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1: |error| <= D u / (1 - D u) |q| |x|,
whatever the order of the sum).
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

ROWS_A_CHUNK = 1 << 14
T = TypeVar("T")


class Rows(Protocol):
    """Descriptors [N, D] that are read in slices: an array, a memory-mapped one, or what makes them as it goes.

    Several threads read at once.
    """

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> np.ndarray: ...


def exact_scores(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The definition of a score: [W, D], [D] -> float64 [W]."""
    return np.add.reduce(np.ascontiguousarray(rows, dtype=np.float64) * query.astype(np.float64), axis=1)


def near_scores(queries: np.ndarray, rows: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """[Q, D], [C, D] -> scores [Q, C] by a matrix product, and by how much those of each query may be off [Q].

    In float32, which holds float16 and float32 exactly, where that has room for the products; else in float64. `start`
    is the index of the first row, for messages. Raises ValueError for a row that is not finite.
    """
    kind = np.float32 if max(_bytes(rows), _bytes(queries)) <= 4 else np.float64
    rows, dim = np.ascontiguousarray(rows, dtype=kind), rows.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("nd,nd->n", rows, rows)
        scores = queries.astype(kind) @ rows.T
    finite = np.isfinite(squares).all() and np.isfinite(scores).all()
    if not finite and not np.isfinite(rows).all():
        raise ValueError(f"the descriptor of database image {start + first_bad(rows)} is not finite")
    if kind is np.float32 and not (finite and squares.max() > 1e-20):
        return near_scores(queries, rows.astype(np.float64), start)
    if not finite:
        raise ValueError("products of descriptors are not finite: they are too long")
    limits = np.finfo(kind)
    bound = dim * float(limits.eps) / 2
    bound /= max(1e-3, 1 - bound)
    longest = np.sqrt(float(squares.max())) * (1 + 2 * bound)
    lengths = np.sqrt(np.square(queries.astype(np.float64)).sum(axis=1))
    return scores, bound * lengths * longest + dim * float(limits.tiny)  # the latter where products vanish


def by_chunks(work: Callable[[Iterator[slice]], T], count: int, *, size: int, bar: tqdm) -> list[T]:
    """Call `work` in a thread for each core with its share of the slices of `range(count)`; what the calls return.

    An error in one of them, or Ctrl-C, ends the others at their next slice.
    """
    starts, ended = range(0, count, size), threading.Event()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(cores, len(starts)))

    def share(first: int) -> Iterator[slice]:
        for start in starts[first::threads]:
            if ended.is_set():
                return
            rows = slice(start, min(start + size, count))
            yield rows
            bar.update(rows.stop - rows.start)

    # BLAS's own threads would keep the cores busy waiting for one another between the products.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(lambda first: work(share(first)), range(threads)))
        finally:
            ended.set()


def first_bad(rows: np.ndarray) -> int:
    """The first of rows [N, D] that is not finite."""
    return int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])


def _bytes(rows: np.ndarray) -> int:
    """Of a number; whole numbers count as float64."""
    return rows.dtype.itemsize if rows.dtype.kind == "f" else 8
