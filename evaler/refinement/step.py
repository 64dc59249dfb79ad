"""What one refinement step is."""

from collections.abc import Sequence

import numpy as np
from yacs.config import CfgNode

from evaler.features.store import Features
from revisitop.scores import Rows


class Step:
    """Changes descriptors before they are scored, their ranking afterwards, or both: whatever it overrides.

    A new one is a file with a subclass, a row in `steps.STEPS` at its place in the order, and its keys in SCORE.
    """

    @classmethod
    def of(cls, cfg: CfgNode) -> "Step | None":
        """The step that the settings ask for, None if they ask for none."""
        raise NotImplementedError

    def line(self, scored: Sequence[str]) -> str:
        """For the result card. scored: sha256 of the descriptors that are scored, from which nothing may be learned."""
        raise NotImplementedError

    def check(self, database: Features) -> None:
        """Raise `FeaturesError` for descriptors that the step was not made for."""

    def descriptors(self, queries: np.ndarray, database: Rows) -> tuple[np.ndarray, Rows]:
        """Descriptors [Q, D] and [N, D] -> [Q, E] and [N, E]."""
        return queries, database

    def ranking(self, queries: np.ndarray, database: Rows, first: np.ndarray | None) -> np.ndarray | None:
        """The first images of each query, best first, int64 [Q, M]; None: as the similarities have them.

        queries and database are what all steps made of them; first is what the steps before returned.
        """
        return first
