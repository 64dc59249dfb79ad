"""Average precision and precision at k as the Revisited benchmark defines them.

Radenovic et al., Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking, CVPR 2018. Junk images are
neither right nor wrong: they are taken out of the ranking before anything is counted. All ranks here start at 0.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from revisitop.errors import ProtocolError


def without_junk(positives: np.ndarray, junk: np.ndarray) -> np.ndarray:
    """Ranks [P] of the positives, ascending, after the images at the ranks `junk` are taken out of the ranking.

    A rank given twice counts once.
    """
    positives = np.unique(positives)
    return positives - np.searchsorted(np.unique(junk), positives)


def average_precision(ranks: np.ndarray, positives: int) -> float:
    """Area under the precision-recall curve by the trapezoid rule.

    ranks: of the positives that were found, ascending, junk taken out. positives: how many there are to find; those
    that were not found count with precision 0.
    """
    positives_above = np.arange(len(ranks))
    # The precision just before a positive is 1 where nothing was returned before it.
    before = np.where(ranks > 0, positives_above / np.maximum(ranks, 1), 1.0)
    at = (positives_above + 1) / (ranks + 1)
    return float((before + at).sum() / (2 * positives))


def precision_at(ranks: np.ndarray, kappas: Sequence[int]) -> np.ndarray:
    """Precision [K] among the first k, for each k of `kappas`.

    As in the published metric k is not larger than the rank (from 1) of the last positive found: what comes after it
    is not held against a query. It is 0 where none was found.
    """
    if not len(ranks):
        return np.zeros(len(kappas))
    cut = np.minimum(ranks.max() + 1, np.asarray(kappas, dtype=np.int64))
    return (ranks[:, None] < cut).sum(axis=0) / cut


def mean_over_queries(
    positives: Sequence[np.ndarray], junk: Sequence[np.ndarray], totals: Sequence[int], kappas: Sequence[int]
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Score rankings given by the ranks of the labelled images.

    positives, junk: for each of Q queries the ranks where they were found; totals: how many positives each has.
    Returns (mAP, AP [Q], mP@k [K], P@k [Q, K]). A query without positives is NaN and left out of the means, which are
    NaN if nothing is left.
    """
    if not all(kappa >= 1 for kappa in kappas):
        raise ProtocolError(f"precision at k needs k of at least 1, not {list(kappas)}")
    aps = np.full(len(totals), np.nan)
    prs = np.full((len(totals), len(kappas)), np.nan)
    for query, (found, ignored, total) in enumerate(zip(positives, junk, totals, strict=True)):
        if total:
            ranks = without_junk(found, ignored)
            aps[query] = average_precision(ranks, total)
            prs[query] = precision_at(ranks, kappas)
    counted = ~np.isnan(aps)
    if not counted.any():
        return np.nan, aps, np.full(len(kappas), np.nan), prs
    return float(aps[counted].mean()), aps, prs[counted].mean(axis=0), prs


def compute_map(
    ranks: np.ndarray, gnd: Sequence[Mapping[str, Sequence[int]]], kappas: Sequence[int] = ()
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Score whole rankings, with the published function's arguments and results.

    ranks: database indices [N, Q], best first, a column a query. gnd: for each query `ok` and, unless it has none,
    `junk`: database indices. Returns (mAP, AP [Q], mP@k [K], P@k [Q, K]) as `mean_over_queries`.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim != 2 or ranks.shape[1] != len(gnd):
        raise ProtocolError(f"{len(gnd)} queries need ranks of shape [database, {len(gnd)}], not {ranks.shape}")
    columns = [(column, labels["ok"], labels.get("junk", ())) for column, labels in zip(ranks.T, gnd, strict=True)]
    positives = [np.flatnonzero(np.isin(column, ok)) for column, ok, _ in columns]
    junk = [np.flatnonzero(np.isin(column, bad)) for column, _, bad in columns]
    return mean_over_queries(positives, junk, [len(ok) for _, ok, _ in columns], kappas)
