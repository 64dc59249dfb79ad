"""What a page shows of one run: first images, places of the labelled ones, and curves, query by query."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaler.features.store import Features
from evaler.features.top_k import top_k
from evaler.scoring.labels import score_labelled
from evaler.scoring.ranked_metrics import average_precision
from evaler.scoring.revisited import LoadedSet
from revisitop.average_precision import without_junk
from revisitop.groundtruth import LABELS, GroundTruth
from revisitop.protocol import SETTINGS, rank_labelled
from revisitop.streamed_ranks import standings

RECALLS = np.linspace(0, 1, 101)
SAME, OTHER = "same", "other"


@dataclass(frozen=True, eq=False)
class RankedList:
    """Of one query. Images are indices into the database, ranks start at 0.

    found: the first images with score and label, best first (a label is easy, hard, junk, negative, same, other, or
    empty where nothing is known). missed: the right images that are not among these, with rank and label, by rank.
    ranks: setting -> those of the right images, ascending, ignored ones taken out. aps: setting -> percent, None
    without right images.
    """

    found: list[tuple[int, float, str]]
    missed: list[tuple[int, int, str]]
    ranks: dict[str, list[int]]
    aps: dict[str, float | None]


def revisited_lists(
    loaded: LoadedSet, truth: GroundTruth, aps: Mapping[str, Sequence], *, top: int
) -> list[RankedList]:
    """A list for each query of a Revisited set. aps: setting -> AP of each query in percent, as scored."""
    scores, ranked = first_images(loaded, top=top)
    lists = []
    for number, (query, standing) in enumerate(
        zip(truth.gnd, rank_labelled(loaded.queries, loaded.gallery, truth, first=loaded.first), strict=True)
    ):
        images = np.concatenate([getattr(query, label) for label in LABELS])
        kinds = np.repeat(LABELS, [len(getattr(query, label)) for label in LABELS])
        label_of = dict(zip(images.tolist(), kinds.tolist(), strict=True))
        rows = zip(ranked[number].tolist(), scores[number].tolist(), strict=True)
        shown = [(image, score, label_of.get(image, "negative")) for image, score in rows]
        ranks = {}
        for setting, labels in SETTINGS.items():
            good, ignored = (np.sort(standing.ranks[np.isin(kinds, names)]) for names in labels)
            ranks[setting] = without_junk(good, ignored).tolist()
        placed = zip(images.tolist(), standing.ranks.tolist(), kinds.tolist(), strict=True)
        right = [row for row in placed if row[2] != "junk"]
        of_query = {setting: aps[setting][number] for setting in SETTINGS}
        lists.append(RankedList(shown, _missed(right, shown), ranks, of_query))
    return lists


def first_images(loaded: LoadedSet, *, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and indices [Q, K] of the first images; re-ranked ones in their new order, with the scores they had."""
    if loaded.first is None or not loaded.first.size:
        return top_k(loaded.queries, loaded.gallery, top)
    scores, ranked = top_k(loaded.queries, loaded.gallery, max(top, loaded.first.shape[1]))
    for of_one, images, first in zip(scores, ranked, loaded.first, strict=True):
        place = {image: number for number, image in enumerate(images.tolist())}
        of_one[: len(first)] = of_one[[place[image] for image in first.tolist()]]
        images[: len(first)] = first
    return scores[:, :top], ranked[:, :top]


def own_lists(
    features: Features, queries: Sequence[int], labels: Mapping[str, str] | None, *, top: int
) -> tuple[list[RankedList], dict | None]:
    """The images `queries` of a set against all others of it, and what `score_labelled` gives where it has labels."""
    vectors = features.vectors
    asked = np.asarray(vectors[list(queries)], dtype=np.float32)
    scores, ranked = top_k(asked, vectors, top, exclude=queries)
    if labels is None:
        rows = zip(ranked.tolist(), scores.tolist(), strict=True)
        return [RankedList([(i, s, "") for i, s in zip(*row, strict=True)], [], {}, {}) for row in rows], None
    score = score_labelled(features, labels)
    members: dict[str, list[int]] = {}
    for index, name in enumerate(features.names):
        members.setdefault(labels[name], []).append(index)
    wanted = [np.array(members[labels[features.names[query]]]) for query in queries]
    lists = []
    for number, (query, images, standing) in enumerate(
        zip(queries, wanted, standings(asked, vectors, wanted), strict=True)
    ):
        is_query = images == query
        ranks = without_junk(standing.ranks[~is_query], standing.ranks[is_query])
        same = set(images.tolist())
        rows = zip(ranked[number].tolist(), scores[number].tolist(), strict=True)
        shown = [(image, value, SAME if image in same else OTHER) for image, value in rows]
        by_rank = images[~is_query][np.argsort(standing.ranks[~is_query])].tolist()
        right = [(image, rank, SAME) for image, rank in zip(by_rank, ranks.tolist(), strict=True)]
        ap = 100 * average_precision(ranks) if len(ranks) else None
        lists.append(RankedList(shown, _missed(right, shown), {SAME: ranks.tolist()}, {SAME: ap}))
    return lists, score


def mean_curve(lists: Sequence[RankedList], setting: str) -> list[float]:
    """Precision at `RECALLS`, the mean over the queries with right images of the largest precision at that recall or
    a higher one (interpolated precision: Manning et al., Introduction to Information Retrieval, 2008, section 8.4)."""
    curves = [_interpolated(np.array(one.ranks[setting])) for one in lists if one.ranks[setting]]
    return np.mean(curves, axis=0).tolist() if curves else []


def _interpolated(ranks: np.ndarray) -> np.ndarray:
    precision = (np.arange(len(ranks)) + 1) / (ranks + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    # 1e-9: 7 of 10 found is a recall of 0.7, whatever the sums of floats say
    needed = np.ceil(RECALLS * len(ranks) - 1e-9).astype(int)
    return best[np.maximum(needed, 1) - 1]


def _missed(right: Sequence[tuple[int, int, str]], shown: Sequence[tuple]) -> list[tuple[int, int, str]]:
    seen = {image for image, *_ in shown}
    return sorted((row for row in right if row[0] not in seen), key=lambda row: row[1])
