"""Metrics of rankings beside those of the Revisited benchmark, on plain Python and NumPy values."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from core.base.errors import UserError


class Prediction(NamedTuple):
    """What a query is taken for. confidence: any number, larger is surer."""

    landmark: str
    confidence: float


def average_precision_at(retrieved: Sequence[str], relevant: Collection[str], k: int) -> float:
    """AP@k of Google Landmarks v2 retrieval: precision at each relevant image among the first k, summed, over
    min(number of relevant images, k). An image found twice counts once, and its second place is lost.

    Weyand et al., Google Landmarks Dataset v2, CVPR 2020. Raises UserError if nothing is relevant.
    """
    if not relevant:
        raise UserError("a query without relevant images has no average precision")
    hits, total, seen = 0, 0.0, set()
    for place, name in enumerate(retrieved[:k], start=1):
        if name in relevant and name not in seen:
            hits += 1
            total += hits / place
        seen.add(name)
    return total / min(len(relevant), k)


def average_precisions_at(
    retrieved: Mapping[str, Sequence[str]], relevant: Mapping[str, Collection[str]], k: int = 100
) -> dict[str, float]:
    """`average_precision_at` of each query of `relevant`; one for which nothing was found has 0. Their mean is mAP@k.

    Raises UserError for a query that `relevant` does not know.
    """
    unknown = retrieved.keys() - relevant.keys()
    if unknown:
        raise UserError(f"{len(unknown)} queries are not in the solution, {min(unknown)} for one")
    return {query: average_precision_at(retrieved.get(query, ()), names, k) for query, names in relevant.items()}


def precisions_of_right(
    predictions: Mapping[str, Prediction], landmarks: Mapping[str, Collection[str]]
) -> dict[str, float]:
    """Of each query with a landmark the precision at its prediction, 0 if this is wrong; their mean is the micro-AP
    (GAP) of recognition. All predictions are in one ranking by confidence, equal ones by the query's name; queries
    without landmark (`landmarks[query]` is empty) are never right, but a confident prediction for them costs others.

    Weyand et al., CVPR 2020. Raises UserError for a query that `landmarks` does not know, for a
    confidence that is not finite, and if no query has a landmark.
    """
    unknown = predictions.keys() - landmarks.keys()
    if unknown:
        raise UserError(f"{len(unknown)} queries are not in the solution, {min(unknown)} for one")
    precision = {query: 0.0 for query, names in landmarks.items() if names}
    if not precision:
        raise UserError("no query of the solution has a landmark")
    for query, prediction in predictions.items():
        if not np.isfinite(prediction.confidence):
            raise UserError(f"the confidence of {query} is {prediction.confidence}")
    hits = 0
    ranking = sorted(predictions, key=lambda query: (-predictions[query].confidence, query))
    for place, query in enumerate(ranking, start=1):
        if predictions[query].landmark in landmarks[query]:
            hits += 1
            precision[query] = hits / place
    return precision


def recall_at(ranks: np.ndarray, k: int) -> float:
    """1 if one of the positives' ranks (from 0) is among the first k, else 0."""
    return float((ranks < k).any())


def average_precision(ranks: np.ndarray) -> float:
    """Mean of the precision at each positive. ranks [P]: from 0, ascending."""
    return float(((np.arange(len(ranks)) + 1) / (ranks + 1)).mean())


def average_precision_at_r(ranks: np.ndarray) -> float:
    """The same with positives beyond place R counted as not found; R is the number of positives.

    Musgrave et al., A Metric Learning Reality Check, ECCV 2020 (MAP@R).
    """
    first = ranks[ranks < len(ranks)]
    return float(((np.arange(len(first)) + 1) / (first + 1)).sum() / len(ranks))
