"""What is done to descriptors before they are scored: whitening, database augmentation, query expansion, in this order;
and to the ranking after: re-ranking."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from evaler.features.provenance import differing_keys
from evaler.features.rows import Mapped
from evaler.features.store import Features, FeaturesError
from evaler.refinement import whitening
from evaler.refinement.expansion import augment, expand
from evaler.refinement.reranking import rerank
from evaler.refinement.whitening import Whitening
from revisitop.scores import Rows

MANY = 200_000  # images


@dataclass(frozen=True, eq=False)
class PostProcessing:
    """The switches of SCORE."""

    whitening: Whitening | None = None
    dba: int = 0  # neighbours
    dba_alpha: float = 0.0
    qe: int = 0
    qe_alpha: float = 0.0
    candidates: int = 0  # that are re-ranked
    rerank_neighbours: int = 9
    rerank_beta: float = 0.15

    @classmethod
    def of(cls, cfg: CfgNode) -> "PostProcessing":
        """Raises `UserError` for a whitening that cannot be read."""
        learned = whitening.read(Path(cfg.SCORE.WHITENING)) if cfg.SCORE.WHITENING else None
        score = cfg.SCORE
        return cls(
            learned,
            dba=score.DBA,
            dba_alpha=score.DBA_ALPHA,
            qe=score.QE,
            qe_alpha=score.QE_ALPHA,
            candidates=score.RERANK,
            rerank_neighbours=score.RERANK_NEIGHBOURS,
            rerank_beta=score.RERANK_BETA,
        )

    def __bool__(self) -> bool:
        return bool(self.whitening or self.dba or self.qe or self.candidates)

    def steps(self, scored: Sequence[str]) -> list[str]:
        """For the card. scored: sha256 of the descriptors that are scored, on which nothing should be learned."""
        found = []
        if self.whitening:
            told = self.whitening.learned_on
            own = ", THE SCORED SET ITSELF" if told.get("npy_sha256") in scored else ""
            found.append(f"PCA whitening to {self.whitening.dim} (learned on {told.get('set')}{own})")
        if self.dba:
            found.append(f"DBA {self.dba} alpha {self.dba_alpha:g}")
        if self.qe:
            found.append(f"QE {self.qe} alpha {self.qe_alpha:g}")
        if self.candidates:
            how = f"{self.rerank_neighbours} neighbours, beta {self.rerank_beta:g}"
            found.append(f"SuperGlobal re-ranking of {self.candidates} ({how})")
        return found

    def check(self, database: Features) -> None:
        """Raise `FeaturesError` if the whitening was learned on descriptors that were made in another way."""
        if self.whitening is None:
            return
        told, dim = self.whitening.learned_on.get("provenance", {}), len(self.whitening.mean)
        differing = differing_keys(told, database.provenance, but=whitening.MAY_DIFFER)
        if dim != database.vectors.shape[1]:
            differing.append(f"dimension, {dim} and {database.vectors.shape[1]}")
        if differing:
            what = ", ".join(differing)
            raise FeaturesError(f"SCORE.WHITENING was learned on descriptors made in another way (differs in {what})")

    def __call__(self, queries: np.ndarray, database: Rows) -> tuple[np.ndarray, Rows]:
        """Descriptors [Q, D] and [N, D] -> [Q, E] and [N, E]; memory grows with N only by DBA."""
        if self.whitening:
            queries = self.whitening(np.asarray(queries, dtype=np.float32))
            database = Mapped(database, self.whitening, self.whitening.dim)
        if self.dba:
            if database.shape[0] > MANY:
                print(f"note: SCORE.DBA compares {database.shape[0]:,} images with each other: hours", file=sys.stderr)
            database = augment(database, neighbours=self.dba, alpha=self.dba_alpha)
        if self.qe:
            queries = expand(queries, database, neighbours=self.qe, alpha=self.qe_alpha)
        return queries, database

    def first(self, queries: np.ndarray, database: Rows) -> np.ndarray | None:
        """What `__call__` returned -> the first images of each query in new order, int64 [Q, M]; None: as they are."""
        if not self.candidates:
            return None
        how = {"neighbours": self.rerank_neighbours, "beta": self.rerank_beta}
        return rerank(queries, database, candidates=self.candidates, **how)
