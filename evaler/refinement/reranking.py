"""Re-ranking with nothing but global descriptors.

Shao et al., Global Features are All You Need for Image Retrieval and Reranking, ICCV 2023 (SuperGlobal), section 3.3,
https://arxiv.org/abs/2308.06954, as its published code computes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from yacs.config import CfgNode

from core.base.progress import bar
from evaler.features.top_k import top_k
from evaler.refinement.step import Step
from revisitop.scores import Rows


@dataclass(frozen=True)
class Reranking(Step):
    """`rerank` of the first images. It ranks by itself: a ranking that an earlier step made is replaced."""

    candidates: int
    neighbours: int
    beta: float

    @classmethod
    def of(cls, cfg: CfgNode) -> "Reranking | None":
        score = cfg.SCORE
        return cls(score.RERANK, score.RERANK_NEIGHBOURS, score.RERANK_BETA) if score.RERANK else None

    def line(self, scored: Sequence[str]) -> str:
        return f"SuperGlobal re-ranking of {self.candidates} ({self.neighbours} neighbours, beta {self.beta:g})"

    def ranking(self, queries: np.ndarray, database: Rows, first: np.ndarray | None) -> np.ndarray:
        return rerank(queries, database, candidates=self.candidates, neighbours=self.neighbours, beta=self.beta)


def rerank(queries: np.ndarray, database: Rows, *, candidates: int, neighbours: int, beta: float) -> np.ndarray:
    """Queries [Q, D] and images [N, D] -> the first M = min(candidates, N) images of each query in new order, int64.

    Every candidate is refined by its nearest ones among the candidates, which count with `beta` times their similarity.
    The new score is the mean of two: of the query with the refined image, and with it again of the largest values
    of the refined images that are now first. What lies behind the candidates stays where it is.
    """
    _, ranked = top_k(queries, database, candidates)
    reordered = np.empty_like(ranked)
    rows = zip(np.asarray(queries, dtype=np.float64), ranked, strict=True)
    for number, (query, images) in enumerate(bar(rows, "re-ranking", unit="query", total=len(ranked), delay=1)):
        refined = _refined(np.asarray(database[images], dtype=np.float64), neighbours, beta)
        scores = refined @ query
        first = np.argsort(-scores, kind="stable")[: neighbours + 1]
        expanded = refined[first].max(axis=0)
        reordered[number] = images[np.argsort(-(scores + refined @ expanded) / 2, kind="stable")]
    return reordered


def _refined(images: np.ndarray, neighbours: int, beta: float) -> np.ndarray:
    """Images [M, D] -> [M, D]: the weighted mean of each (weight 1) and its nearest; its length is not 1."""
    similarity = images @ images.T
    nearest = similarity.copy()
    np.fill_diagonal(nearest, np.inf)  # itself is the first, also among copies of it
    nearest = np.argsort(-nearest, axis=1, kind="stable")[:, : neighbours + 1]
    weights = np.zeros_like(similarity)
    np.put_along_axis(weights, nearest, beta * np.take_along_axis(similarity, nearest, axis=1), axis=1)
    np.fill_diagonal(weights, 1.0)
    return weights @ images / weights.sum(axis=1, keepdims=True)
