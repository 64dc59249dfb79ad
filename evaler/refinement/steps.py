"""The refinement steps, in the order in which they are applied."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from yacs.config import CfgNode

from evaler.features.store import Features
from evaler.refinement.expansion import DatabaseAugmentation, QueryExpansion
from evaler.refinement.reranking import Reranking
from evaler.refinement.step import Step
from evaler.refinement.whitening import WhiteningStep
from revisitop.scores import Rows

STEPS: tuple[type[Step], ...] = (WhiteningStep, DatabaseAugmentation, QueryExpansion, Reranking)


@dataclass(frozen=True)
class Refinement:
    """The steps that the settings ask for; true if there are any."""

    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, cfg: CfgNode) -> "Refinement":
        """Raises `UserError` for a whitening that cannot be read."""
        return cls(tuple(step for kind in STEPS if (step := kind.of(cfg)) is not None))

    def __bool__(self) -> bool:
        return bool(self.steps)

    def lines(self, scored: Sequence[str]) -> list[str]:
        """See `Step.line`."""
        return [step.line(scored) for step in self.steps]

    def check(self, database: Features) -> None:
        """See `Step.check`."""
        for step in self.steps:
            step.check(database)

    def apply(self, queries: np.ndarray, database: Rows) -> tuple[np.ndarray, Rows, np.ndarray | None]:
        """Descriptors [Q, D] and [N, D] -> descriptors [Q, E] and [N, E], and the ranking of `Step.ranking`.

        Memory grows with N only by database augmentation.
        """
        for step in self.steps:
            queries, database = step.descriptors(queries, database)
        first = None
        for step in self.steps:
            first = step.ranking(queries, database, first)
        return queries, database, first
