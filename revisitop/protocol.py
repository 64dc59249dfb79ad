"""The Easy, Medium and Hard settings of the Revisited benchmark.

Radenovic et al., CVPR 2018, section 4. A ranking goes from the highest score to the lowest, equal scores by the
smaller database index, so that a result does not depend on how a sort treats ties.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from revisitop.average_precision import average_precision, mean_over_queries
from revisitop.errors import ProtocolError
from revisitop.groundtruth import LABELS, GroundTruth, Query
from revisitop.scores import Rows
from revisitop.streamed_ranks import Standing, standings

# Setting -> (labels that count as positives, labels taken out of the ranking).
SETTINGS = {
    "E": (("easy",), ("junk", "hard")),
    "M": (("easy", "hard"), ("junk",)),
    "H": (("hard",), ("junk", "easy")),
}
SETTING_NAMES = {"E": "Easy", "M": "Medium", "H": "Hard"}


def evaluate(
    queries: np.ndarray,
    database: Rows,
    ground_truth: GroundTruth | Sequence[Query | Mapping],
    kappas: Sequence[int] = (1, 5, 10),
    *,
    first: np.ndarray | None = None,
) -> dict[str, dict]:
    """Score descriptors by their dot products.

    queries: [Q, D]. database: [N, D], the images of the ground truth in its order and any number of distractors after
    them. It is read in chunks: memory does not grow with N.
    first: after re-ranking, the M images of highest score of each query in their new order, [Q, M].
    ground_truth: of the Q queries, as read by `groundtruth.load` or as the list `gnd` of the official files.
    Returns for "E", "M" and "H": `mAP` (a fraction, NaN if no query has positives), `mP@k` (a list, one for each k of
    `kappas`), `aps` (AP of each query [Q], NaN for those without positives), and `mAP_bracket` (the least and the
    largest mAP that another order of equal scores gives; both are the mAP where no positive ties with a negative, and
    with `first`, which has no scores to tie).
    Raises ProtocolError as `rank_labelled` does.
    """
    labels = _labels(ground_truth)
    ranked = rank_labelled(queries, database, ground_truth, first=first)
    kinds = [np.repeat(LABELS, [len(query[label]) for label in LABELS]) for query in labels]
    result = {}
    for setting, (good, bad) in SETTINGS.items():
        positives, junk = ([np.isin(kind, names) for kind in kinds] for names in (good, bad))
        ranks, ignored = (
            [standing.ranks[which] for standing, which in zip(ranked, part, strict=True)] for part in (positives, junk)
        )
        mean, aps, precisions, _ = mean_over_queries(ranks, ignored, [len(found_) for found_ in ranks], kappas)
        bracket = _bracket(ranked, positives, junk)
        result[setting] = {"mAP": mean, "mP@k": precisions.tolist(), "aps": aps, "mAP_bracket": bracket}
    return result


def rank_labelled(
    queries: np.ndarray,
    database: Rows,
    ground_truth: GroundTruth | Sequence[Query | Mapping],
    *,
    first: np.ndarray | None = None,
) -> list[Standing]:
    """Where the labelled images of each query stand: easy, then hard, then junk ones. Arguments: see `evaluate`.

    Raises ProtocolError where shapes, indices or values do not fit.
    """
    labels = _labels(ground_truth)
    queries, count = np.asarray(queries), database.shape[0]
    if queries.ndim != 2 or len(database.shape) != 2 or queries.shape[1] != database.shape[1]:
        raise ProtocolError(f"queries {queries.shape} and database {database.shape} are not [Q, D] and [N, D]")
    if len(queries) != len(labels):
        raise ProtocolError(f"{len(queries)} query descriptors for a ground truth of {len(labels)} queries")
    for index, query in enumerate(labels):
        for label, images in query.items():
            if len(images) and not 0 <= images.min() <= images.max() < count:
                raise ProtocolError(f"query {index}: {label} holds an index outside the {count} database images")

    labelled = [np.concatenate(list(query.values())) for query in labels]
    ranked = standings(queries, database, labelled)
    if first is None:
        return ranked
    return [_reordered(*of_one) for of_one in zip(ranked, labelled, first, strict=True)]


def _reordered(standing: Standing, images: np.ndarray, first: np.ndarray) -> Standing:
    """The standing of images [W] after the first M of the ranking were put into the order `first` [M]."""
    order = np.argsort(first)
    place = np.minimum(np.searchsorted(first, images, sorter=order), len(first) - 1)
    inside = first[order[place]] == images
    assert (inside == (standing.ranks < len(first))).all(), "re-ranked are others than the first"
    ranks = np.where(inside, order[place], standing.ranks)
    return Standing(ranks, np.zeros_like(ranks), np.ones_like(ranks))


def _bracket(ranked: Sequence[Standing], good: Sequence[np.ndarray], bad: Sequence[np.ndarray]) -> list[float]:
    """The least and the largest mAP that an order of equal scores can give: negatives first, or positives first.

    found: of all labelled images of each query; good, bad: which of them are positives and junk, boolean [W].
    """
    aps: list[tuple[float, float]] = []
    for standing, positive, junk in zip(ranked, good, bad, strict=True):
        if not positive.any():
            continue
        # An index given twice is one image, which its rank tells. The fewer above, the higher the score.
        once, total = np.zeros(len(positive), bool), positive.sum()
        once[np.unique(standing.ranks, return_index=True)[1]] = True
        labelled, above = np.sort(standing.above[once & (positive | junk)]), np.sort(standing.above[once & positive])
        equal = dict(zip(standing.above.tolist(), standing.equal.tolist(), strict=True))
        higher = np.searchsorted(labelled, above, side="left")
        negatives = above - higher
        tied = [equal[place] for place in above.tolist()] - (np.searchsorted(labelled, above, side="right") - higher)
        before = np.arange(len(above))
        least, most = (average_precision(ranks + before, total) for ranks in (negatives + tied, negatives))
        aps.append((least, most))
    return np.mean(aps, axis=0).tolist() if aps else [np.nan, np.nan]


def _labels(ground_truth: GroundTruth | Sequence[Query | Mapping]) -> list[dict[str, np.ndarray]]:
    entries = ground_truth.gnd if isinstance(ground_truth, GroundTruth) else ground_truth
    return [{label: _indices(entry, label) for label in LABELS} for entry in entries]


def _indices(entry: Query | Mapping, label: str) -> np.ndarray:
    return np.asarray(entry[label] if isinstance(entry, Mapping) else getattr(entry, label), dtype=np.int64)
