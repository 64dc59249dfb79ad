"""What a search outside this code found, checked before names are given to it."""

import numpy as np

from evaler.features.store import FeaturesError

# Scores of descriptors of length 1 that were kept as float32; float16 ones are inserted as what they are.
TOLERANCE = 1e-3


def check_found(scores: np.ndarray, rows: np.ndarray, count: int, *, source: str) -> None:
    """Scores and rows [Q, K] as `top_k` gives them, of a collection of `count` images; -1 fills up a row's end.

    Raises `FeaturesError` for rows that are no images, an image found twice, and scores that are not finite or not in
    order.
    """
    valid = rows >= 0
    if rows.shape != scores.shape or rows.dtype.kind != "i" or (rows < -1).any() or (rows >= count).any():
        raise FeaturesError(f"{source}: found rows that are none of the {count} images; build it again")
    if (~valid[:, :-1] & valid[:, 1:]).any():
        raise FeaturesError(f"{source}: found images behind empty places; build it again")
    for images, of_one, there in zip(rows, scores, valid, strict=True):
        if len(np.unique(images[there])) != there.sum():
            raise FeaturesError(f"{source}: found one image twice; build it again")
        if not np.isfinite(of_one[there]).all():
            raise FeaturesError(f"{source}: scores that are not finite; build it again")
        if (np.diff(of_one[there]) > 0).any():
            raise FeaturesError(f"{source}: scores do not fall: it orders by a distance, not by the dot product")


def check_scores(
    queries: np.ndarray, vectors: np.ndarray, scores: np.ndarray, rows: np.ndarray, *, source: str
) -> None:
    """Raise `FeaturesError` if these are not the scores of these rows: what was searched holds other descriptors."""
    for query, of_one, images in zip(np.asarray(queries, np.float64), scores, rows, strict=True):
        expected = np.asarray(vectors[images], dtype=np.float64) @ query
        if len(images) and np.abs(expected - of_one).max() > TOLERANCE * max(1.0, float(np.linalg.norm(query))):
            raise FeaturesError(f"{source}: its scores are not those of the descriptors here; it holds others")
