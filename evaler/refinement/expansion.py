"""Query expansion and database augmentation: descriptors moved towards their nearest neighbours."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from yacs.config import CfgNode

from core.base.progress import bar
from evaler.features.top_k import top_k
from evaler.refinement.step import Step
from revisitop.scores import Rows

QUERIES_AT_ONCE = 1024
MANY = 200_000  # images


@dataclass(frozen=True)
class DatabaseAugmentation(Step):
    """`augment` of the database."""

    neighbours: int
    alpha: float

    @classmethod
    def of(cls, cfg: CfgNode) -> "DatabaseAugmentation | None":
        return cls(cfg.SCORE.DBA, cfg.SCORE.DBA_ALPHA) if cfg.SCORE.DBA else None

    def line(self, scored: Sequence[str]) -> str:
        return f"DBA {self.neighbours} alpha {self.alpha:g}"

    def descriptors(self, queries: np.ndarray, database: Rows) -> tuple[np.ndarray, Rows]:
        if database.shape[0] > MANY:
            print(f"note: SCORE.DBA compares {database.shape[0]:,} images with each other: hours", file=sys.stderr)
        return queries, augment(database, neighbours=self.neighbours, alpha=self.alpha)


@dataclass(frozen=True)
class QueryExpansion(Step):
    """`expand` of the queries."""

    neighbours: int
    alpha: float

    @classmethod
    def of(cls, cfg: CfgNode) -> "QueryExpansion | None":
        return cls(cfg.SCORE.QE, cfg.SCORE.QE_ALPHA) if cfg.SCORE.QE else None

    def line(self, scored: Sequence[str]) -> str:
        return f"QE {self.neighbours} alpha {self.alpha:g}"

    def descriptors(self, queries: np.ndarray, database: Rows) -> tuple[np.ndarray, Rows]:
        return expand(queries, database, neighbours=self.neighbours, alpha=self.alpha), database


def expand(queries: np.ndarray, database: Rows, *, neighbours: int, alpha: float) -> np.ndarray:
    """Queries [Q, D] of length 1 -> float32 [Q, D]: each the sum of itself and its nearest images, normalised.

    An image counts with its similarity to the power of `alpha`, 0 if that is negative. alpha 0 is average query
    expansion (Chum et al., Total Recall, ICCV 2007), 3 is usual (Radenovic et al., Fine-tuning CNN Image Retrieval with
    No Human Annotation, TPAMI 2019).
    """
    return _moved(queries, database, neighbours, alpha, exclude=None, shown=True)


def augment(database: Rows, *, neighbours: int, alpha: float) -> np.ndarray:
    """The same for the images of a database [N, D] themselves, each without itself among its neighbours.

    Turcot and Lowe, ICCV Workshops 2009; Arandjelovic and Zisserman, CVPR 2012. All of [N, D] is held, and
    the time grows with N squared.
    """
    moved = np.empty(database.shape, np.float32)
    with bar(None, "augmenting", unit="image", total=database.shape[0], delay=1, leave=False) as shown:
        for start in range(0, database.shape[0], QUERIES_AT_ONCE):
            rows = np.asarray(database[start : start + QUERIES_AT_ONCE], dtype=np.float32)
            themselves = np.arange(start, start + len(rows))
            moved[start : start + len(rows)] = _moved(
                rows, database, neighbours, alpha, exclude=themselves, shown=False
            )
            shown.update(len(rows))
    return moved


def _moved(
    rows: np.ndarray, database: Rows, neighbours: int, alpha: float, *, exclude: np.ndarray | None, shown: bool
) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    scores, nearest = top_k(rows, database, neighbours, exclude=exclude, shown=shown)
    weights = np.maximum(scores.astype(np.float64), 0) ** alpha
    result = np.empty_like(rows)
    for number, (row, weight, images) in enumerate(zip(rows, weights, nearest, strict=True)):
        moved = row + weight @ np.asarray(database[images], dtype=np.float64)
        result[number] = moved / max(np.linalg.norm(moved), 1e-12)
    return result
