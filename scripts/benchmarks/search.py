"""Exact search, ours against faiss's flat index and a plain matrix product with torch.topk, on the same cores."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from evaler.features.top_k import top_k
from revisitop.scores import ROWS_A_CHUNK
from scripts.benchmarks.timing import Case, compare

COUNT = 1_005_994  # ROxford5k and R1M
# queries, images, and whom ours is compared with
SHAPES = ((70, COUNT, "faiss"), (70, 5000, "faiss"), (1, 100_000, "torch"), (1000, 200_000, "torch"))


def search_cases(
    *,
    shapes: tuple[tuple[int, int, str], ...] = SHAPES,
    dim: int = 512,
    k: int = 100,
    seconds: float = 30.0,
    least: int = 5,
) -> Iterator[Case]:
    """Raises `AssertionError` if the two find other images, but for those whose scores float32 does not tell apart."""
    for queries, count, against in shapes:
        yield _case(queries, count, against, dim=dim, k=k, seconds=seconds, least=least)


def _case(queries: int, count: int, against: str, *, dim: int, k: int, seconds: float, least: int) -> Case:
    rng = np.random.default_rng(0)
    asked, database = (np.empty((number, dim), np.float32) for number in (queries, count))
    for rows in (asked, database):
        for start in range(0, len(rows), ROWS_A_CHUNK):
            part = rows[start : start + ROWS_A_CHUNK]
            part[:] = rng.standard_normal(part.shape, dtype=np.float32)
            part /= np.linalg.norm(part, axis=1, keepdims=True)
    results: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    processor: dict[str, list[float]] = {"ours": [], "theirs": []}

    def timed(side: str, search) -> None:
        start = time.process_time()
        results[side] = search()
        processor[side].append(time.process_time() - start)

    if against == "faiss":
        import faiss

        index = faiss.IndexFlatIP(dim)
        index.add(database)
        peer = f"IndexFlatIP of faiss {faiss.__version__}"

        def theirs() -> tuple[np.ndarray, np.ndarray]:
            return index.search(asked, k)
    else:
        peer, images = "torch.topk(q @ db.T)", torch.from_numpy(database)

        def theirs() -> tuple[np.ndarray, np.ndarray]:
            scores, indices = torch.topk(torch.from_numpy(asked) @ images.T, k)
            return scores.numpy(), indices.numpy()

    result = compare(
        f"{queries} x {count:,} x {dim}, top {k}",
        lambda: timed("ours", lambda: top_k(asked, database, k, shown=False)),
        lambda: timed("theirs", theirs),
        seconds=seconds,
        least=least,
    )
    assert np.abs(results["ours"][0] - results["theirs"][0]).max() < 1e-5
    same = (
        np.mean([len(np.intersect1d(a, b)) for a, b in zip(results["ours"][1], results["theirs"][1], strict=True)]) / k
    )
    assert same > 0.999, same
    ratio = np.median(processor["theirs"][1:]) / np.median(processor["ours"][1:])
    return replace(result, note=f"against {peer}; of processor time {ratio:.2f}x")
