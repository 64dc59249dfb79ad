"""Metrics of rankings beside those of the Revisited benchmark, on plain Python and NumPy values."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from core.base.errors import UserError


class Prediction(NamedTuple):
    """What a query is taken for. confidence: any number, larger is surer."""

    landmark: str
    confidence: float


def average_precision_at(found: Sequence[str], relevant: Collection[str], k: int) -> float:
    """AP@k of Google Landmarks v2 retrieval: precision at each relevant image among the first k, summed, over
    min(number of relevant images, k). An image found twice counts once, and its second place is lost.

    Weyand et al., Google Landmarks Dataset v2, CVPR 2020. Raises UserError if nothing is relevant.
    """
    if not relevant:
        raise UserError("a query without relevant images has no average precision")
    hits, total, seen = 0, 0.0, set()
    for place, name in enumerate(found[:k], start=1):
        if name in relevant and name not in seen:
            hits += 1
            total += hits / place
        seen.add(name)
    return total / min(len(relevant), k)


def mean_average_precision_at(
    found: Mapping[str, Sequence[str]], relevant: Mapping[str, Collection[str]], k: int = 100
) -> float:
    """Mean of `average_precision_at` over all queries of `relevant`; one for which nothing was found has 0.

    Raises UserError for a query that `relevant` does not know.
    """
    unknown = found.keys() - relevant.keys()
    if unknown:
        raise UserError(f"{len(unknown)} queries are not in the solution, {min(unknown)} for one")
    return float(np.mean([average_precision_at(found.get(query, ()), names, k) for query, names in relevant.items()]))


def global_average_precision(predictions: Mapping[str, Prediction], landmarks: Mapping[str, Collection[str]]) -> float:
    """Micro-AP (GAP) of recognition: all predictions in one ranking by confidence, equal ones by the query's name.

    sum of precision at each right prediction, over the number of queries with a landmark. Queries without one
    (`landmarks[query]` is empty) are never right, so that a confident prediction for them costs precision.
    Weyand et al., CVPR 2020. Raises UserError for a query that `landmarks` does not know, for a
    confidence that is not finite, and if no query has a landmark.
    """
    unknown = predictions.keys() - landmarks.keys()
    if unknown:
        raise UserError(f"{len(unknown)} queries are not in the solution, {min(unknown)} for one")
    count = sum(bool(names) for names in landmarks.values())
    if not count:
        raise UserError("no query of the solution has a landmark")
    for query, prediction in predictions.items():
        if not np.isfinite(prediction.confidence):
            raise UserError(f"the confidence of {query} is {prediction.confidence}")
    hits, total = 0, 0.0
    ranking = sorted(predictions, key=lambda query: (-predictions[query].confidence, query))
    for place, query in enumerate(ranking, start=1):
        if predictions[query].landmark in landmarks[query]:
            hits += 1
            total += hits / place
    return total / count


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
