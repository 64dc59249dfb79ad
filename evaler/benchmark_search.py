"""Ours against faiss's flat index: exact search for the best images of a million, on the same cores."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from core.benchmark import Case, compare
from evaler.top_k import top_k
from revisitop.scores import ROWS_A_CHUNK

COUNT = 1_005_994  # ROxford5k and R1M


def search_cases(
    *, queries: int = 70, count: int = COUNT, dim: int = 512, k: int = 100, seconds: float = 30.0, least: int = 3
) -> Iterator[Case]:
    """Raises `AssertionError` if the two find other images, but for those whose scores float32 does not tell apart."""
    import faiss

    rng = np.random.default_rng(0)
    asked, database = (np.empty((number, dim), np.float32) for number in (queries, count))
    for rows in (asked, database):
        for start in range(0, len(rows), ROWS_A_CHUNK):
            part = rows[start : start + ROWS_A_CHUNK]
            part[:] = rng.standard_normal(part.shape, dtype=np.float32)
            part /= np.linalg.norm(part, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(dim)
    index.add(database)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def ours() -> None:
        found["ours"] = top_k(asked, database, k, shown=False)

    def flat() -> None:
        found["faiss"] = index.search(asked, k)

    case = f"{queries} x {count:,} x {dim}, top {k}"
    result = compare(case, ours, flat, seconds=seconds, least=least)
    assert np.abs(found["ours"][0] - found["faiss"][0]).max() < 1e-5
    same = np.mean([len(np.intersect1d(a, b)) for a, b in zip(found["ours"][1], found["faiss"][1], strict=True)]) / k
    assert same > 0.999, same
    yield replace(result, note=f"against IndexFlatIP of faiss {faiss.__version__}")
