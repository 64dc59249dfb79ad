"""Ours against the published way of scoring: product, whole sort, and the metric three times. In processor time."""

import functools
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from evaler.features.rows import Stacked
from revisitop import groundtruth
from revisitop.average_precision import compute_map
from revisitop.protocol import SETTINGS, evaluate
from revisitop.scores import ROWS_A_CHUNK
from scripts.benchmarks.timing import Case

KAPPAS = (1, 5, 10)
IMAGES, DISTRACTORS = 4_993, 1_001_001  # of ROxford5k, and of R1M
LARGEST_DIFFERENCE = 1e-6  # of a mAP, as a fraction: the published scores are float32
LARGEST_DIFFERENCE_FLOAT16 = 1e-4
Labels = list[dict[str, list[int]]]


def evaluate_cases(
    *, images: int = IMAGES, distractors: int = DISTRACTORS, dim: int = 512, truth: Path | None = None, runs: int = 3
) -> Iterator[Case]:
    """Generated descriptors with the labels of `truth`, or with generated ones.

    Raises `AssertionError` if the two sides print different scores, or float16 moves one by more than 0.01 points.
    """
    labels, images = (_labels(images), images) if truth is None else _read(truth)
    queries, database = _descriptors(labels, images, images + distractors, dim)
    scores: dict[str, dict] = {}

    def ours() -> None:
        scores["ours"] = evaluate(queries, database, labels, KAPPAS)

    def published() -> None:
        scores["published"] = evaluate_as_published(queries, database, labels)

    seconds = [(_processor_seconds(ours), _processor_seconds(published)) for _ in range(runs)]
    difference = _difference(scores["ours"], scores["published"])
    assert difference <= LARGEST_DIFFERENCE, difference
    half = _difference(evaluate(queries.astype(np.float16), database.astype(np.float16), labels), scores["ours"])
    assert half <= LARGEST_DIFFERENCE_FLOAT16, half
    case = f"{len(queries)} x {len(database):,} x {dim}"
    note = f"processor time; mAP M {100 * scores['ours']['M']['mAP']:.2f}, largest difference {100 * difference:.1e} "
    note += f"points, float16 {100 * half:.1e}; memory {_peak(ours) >> 20} and {_peak(published) >> 20} MiB"
    yield Case(case, [pair[0] for pair in seconds], [pair[1] for pair in seconds], note)


def stream_cases(*, count: int = 10_000_000, dim: int = 512) -> Iterator[Case]:
    """A generated stream, ten times as long as one of a tenth: a ratio of 1 is time linear in its length."""
    labels = _labels(IMAGES)
    queries, first = _descriptors(labels, IMAGES, ROWS_A_CHUNK, dim)  # a chunk, so that the stream's are read whole
    seconds, peaks = [], []

    def score(length: int) -> None:
        evaluate(queries, Stacked([first, Stream(length, dim)]), labels, KAPPAS)

    for length in (count // 10, count):
        seconds.append(_processor_seconds(functools.partial(score, length)))
        peaks.append(_peak(functools.partial(score, length)) >> 20)
    note = f"processor time with generation; memory {peaks[1]} MiB, for a tenth {peaks[0]} MiB"
    yield Case(f"{len(queries)} x {count:,} x {dim}, against 10 x a tenth", seconds[1:], [10 * seconds[0]], note)


class Stream:
    """Descriptors of length 1 that are made as they are read: rows of one block, turned round and mirrored."""

    def __init__(self, count: int, dim: int) -> None:
        self.shape = (count, dim)
        self._block = _normalised(np.random.default_rng(1).normal(size=(ROWS_A_CHUNK, dim)).astype(np.float32))

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        assert isinstance(rows, slice), "read in order"
        number, offset = divmod(rows.start, ROWS_A_CHUNK)
        length = min(rows.stop, self.shape[0]) - rows.start
        assert offset + length <= ROWS_A_CHUNK, rows
        signs = np.random.default_rng(number).choice(np.array([-1, 1], np.float32), self.shape[1])
        return np.roll(self._block[offset : offset + length], number, axis=1) * signs


def evaluate_as_published(queries: np.ndarray, database: np.ndarray, labels: Labels) -> dict[str, dict]:
    """As `protocol.evaluate`, by a whole sort of all scores."""
    ranks = np.argsort(-np.dot(database, queries.T), axis=0)
    result = {}
    for setting, (good, bad) in SETTINGS.items():
        gnd = [
            {"ok": [i for key in good for i in query[key]], "junk": [i for key in bad for i in query[key]]}
            for query in labels
        ]
        mean, aps, precisions, _ = compute_map(ranks, gnd, KAPPAS)
        result[setting] = {"mAP": mean, "mP@k": precisions.tolist(), "aps": aps}
    return result


def _difference(a: dict[str, dict], b: dict[str, dict]) -> float:
    return max(abs(a[setting]["mAP"] - b[setting]["mAP"]) for setting in SETTINGS)


def _processor_seconds(side: Callable[[], object]) -> float:
    start = time.process_time()
    side()
    return time.process_time() - start


def _peak(side: Callable[[], object]) -> int:
    """Bytes that NumPy holds at once, beyond what it holds before."""
    tracemalloc.start()
    try:
        side()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _read(path: Path) -> tuple[Labels, int]:
    truth = groundtruth.load(path)
    keys = ("easy", "hard", "junk")
    return [{key: getattr(query, key).tolist() for key in keys} for query in truth.gnd], len(truth.imlist)


def _labels(images: int, queries: int = 70) -> Labels:
    """About as many as ROxford5k has."""
    rng = np.random.default_rng(0)
    labels = []
    for _ in range(queries):
        chosen = rng.permutation(images).tolist()
        labels.append({"easy": chosen[:45], "hard": chosen[45:85], "junk": chosen[85:110]})
    return labels


def _descriptors(labels: Labels, images: int, count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Random directions; those of positives are drawn towards their queries', of easy ones more than of hard ones."""
    rng = np.random.default_rng(0)
    queries = _normalised(rng.normal(size=(len(labels), dim)).astype(np.float32))
    database = np.empty((count, dim), np.float32)
    for start in range(0, count, ROWS_A_CHUNK):
        rows = database[start : start + ROWS_A_CHUNK]
        rows[:] = _normalised(rng.standard_normal(rows.shape, dtype=np.float32))
    for query, label in zip(queries, labels, strict=True):
        for key, low, high in (("easy", 0.2, 1.2), ("hard", 0.1, 0.7), ("junk", 0.1, 1.0)):
            chosen = np.array(label[key], dtype=np.int64)
            database[chosen] += rng.uniform(low, high, (len(chosen), 1)).astype(np.float32) * query
    database[:images] = _normalised(database[:images])
    return queries, database


def _normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
