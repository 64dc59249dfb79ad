"""The Easy, Medium and Hard settings of the Revisited benchmark.

Radenovic et al., CVPR 2018, section 4. A ranking goes from the highest score to the lowest, equal scores by the
smaller database index, so that a result does not depend on how a sort treats ties.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from revisitop.average_precision import mean_over_queries
from revisitop.groundtruth import LABELS, GroundTruth, Query

# Setting -> (labels that count as positives, labels taken out of the ranking).
SETTINGS = {
    "E": (("easy",), ("junk", "hard")),
    "M": (("easy", "hard"), ("junk",)),
    "H": (("hard",), ("junk", "easy")),
}
ROWS_A_CHUNK = 1 << 14


def evaluate(
    queries: np.ndarray,
    database: np.ndarray,
    ground_truth: GroundTruth | Sequence[Query | Mapping],
    kappas: Sequence[int] = (1, 5, 10),
) -> dict[str, dict]:
    """Score descriptors by their dot products.

    queries: [Q, D]. database: [N, D], the images of the ground truth in its order and any number of distractors after
    them. ground_truth: of the Q queries, as read by `groundtruth.load` or as the list `gnd` of the official files.
    Returns for "E", "M" and "H": `mAP` (a fraction, NaN if no query has positives), `mP@k` (a list, one for each k of
    `kappas`) and `aps` (AP of each query [Q], NaN for those without positives).
    Raises ValueError where shapes, indices or values do not fit.
    """
    entries = ground_truth.gnd if isinstance(ground_truth, GroundTruth) else ground_truth
    labels = [{label: _indices(entry, label) for label in LABELS} for entry in entries]
    queries, database = np.asarray(queries), np.asarray(database)
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise ValueError(f"queries {queries.shape} and database {database.shape} are not [Q, D] and [N, D]")
    if len(queries) != len(labels):
        raise ValueError(f"{len(queries)} query descriptors for a ground truth of {len(labels)} queries")
    for index, query in enumerate(labels):
        for label, images in query.items():
            if len(images) and not 0 <= images.min() <= images.max() < len(database):
                raise ValueError(f"query {index}: {label} holds an index outside the {len(database)} database images")

    wanted = [np.concatenate(list(query.values())) for query in labels]
    ranks = [
        dict(zip(LABELS, np.split(found, np.cumsum([len(query[label]) for label in LABELS[:-1]])), strict=True))
        for found, query in zip(rank_images(queries, database, wanted), labels, strict=True)
    ]
    result = {}
    for setting, (good, bad) in SETTINGS.items():
        positives = [np.concatenate([query[label] for label in good]) for query in ranks]
        junk = [np.concatenate([query[label] for label in bad]) for query in ranks]
        mean, aps, precisions, _ = mean_over_queries(positives, junk, [len(found) for found in positives], kappas)
        result[setting] = {"mAP": mean, "mP@k": precisions.tolist(), "aps": aps}
    return result


def rank_images(queries: np.ndarray, database: np.ndarray, wanted: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Ranks, from 0, of the images `wanted[q]` (database indices [W]) in the ranking of query q; a list of [W].

    Everything the protocol needs of a ranking, and the only place where one is made. Scores are computed in float64
    whatever the descriptors are: [Q, N] of them are held at once.
    """
    queries = queries.astype(np.float64)
    scores = np.empty((len(queries), len(database)))
    for start in range(0, len(database), ROWS_A_CHUNK):
        rows = np.asarray(database[start : start + ROWS_A_CHUNK], dtype=np.float64)
        scores[:, start : start + len(rows)] = queries @ rows.T
    if not np.isfinite(scores).all():
        raise ValueError("descriptors are not finite, or their products are not")
    result = []
    rank = np.empty(len(database), dtype=np.int64)
    for row, images in zip(tqdm(scores, desc="ranking", unit="query", leave=False, delay=1), wanted, strict=True):
        rank[np.argsort(-row, kind="stable")] = np.arange(len(row))
        result.append(rank[images])
    return result


def _indices(entry: Query | Mapping, label: str) -> np.ndarray:
    return np.asarray(entry[label] if isinstance(entry, Mapping) else getattr(entry, label), dtype=np.int64)
