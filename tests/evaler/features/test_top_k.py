"""Exact search: equal to a whole sort of float64 scores, whatever the chunks, ties and types."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaler.features import top_k as module
from evaler.features.top_k import top_k


def sorted_(queries, database, k, exclude=None):
    for number, query in enumerate(queries.astype(np.float32).astype(np.float64)):
        scores = np.array([(row.astype(np.float64) * query).sum() for row in database])
        order = [i for i in np.argsort(-scores, kind="stable") if exclude is None or i != exclude[number]][:k]
        yield order, scores[order].astype(np.float32)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["f2", "f4"]), st.integers(1, 60), st.integers(1, 30), st.booleans())
def test_equal_to_sorting(seed, kind, count, k, excluding):
    rng = np.random.default_rng(seed)
    queries, database = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(count, 8)).astype(kind)
    if seed % 2:
        queries, database = np.round(queries), np.round(database)  # many equal scores
    exclude = rng.integers(0, count, 3) if excluding else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_A_CHUNK", int(rng.integers(1, 70)))
        patch.setattr(module, "QUERIES_AT_ONCE", int(rng.integers(1, 4)))
        patch.setattr(module, "QUERIES_A_PASS", int(rng.integers(1, 4)))
        scores, indices = top_k(queries, database, k, exclude=exclude)
    for (order, expected), found, at in zip(sorted_(queries, database, k, exclude), scores, indices, strict=True):
        assert at.tolist() == order
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("count", [3, 12])  # few queries have a wider bound
def test_lengths_of_all_kinds_and_ties_in_small_pieces(monkeypatch, count):
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 16)
    monkeypatch.setattr(module, "FEWEST", 1)
    rng = np.random.default_rng(4)
    database = np.round(rng.normal(size=(90, 8))).astype(np.float32)
    database[::7] *= np.float32(1e4)  # their scores are rounded more than others differ
    database[3:9] = database[30:36] = database[2]
    queries = rng.normal(size=(count, 8)).astype(np.float32)
    scores, indices = top_k(queries, database, 20)
    for (order, expected), found, at in zip(sorted_(queries, database, 20), scores, indices, strict=True):
        assert at.tolist() == order and np.array_equal(found, expected)


def test_memory_of_many_queries_is_bounded_where_all_tie(monkeypatch):
    monkeypatch.setattr(module, "ROWS_A_CHUNK", 4096)
    tracemalloc.start()
    top_k(np.ones((64, 2), np.float32), np.ones((4096, 2), np.float32), 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6  # 262,144 pairs


def test_many_candidates_are_reduced_to_the_right_ones():
    rng = np.random.default_rng(0)
    database = rng.normal(size=(60_000, 16)).astype(np.float32)
    queries = database[[5, 40_000]]
    scores, indices = top_k(queries, database, 10)
    for (order, expected), found, at in zip(sorted_(queries, database, 10), scores, indices, strict=True):
        assert at.tolist() == order and np.array_equal(found, expected)


def test_an_image_excluded_is_not_found_and_minus_one_excludes_none():
    database = np.eye(4, dtype=np.float32)
    _, indices = top_k(database[:2], database, 9, exclude=[0, -1])
    assert indices.shape == (2, 3) and 0 not in indices[0] and indices[1, 0] == 1


@pytest.mark.parametrize(
    ("queries", "count", "k", "message"),
    [((2, 3), 4, 1, "are not"), ((2,), 4, 1, "are not"), ((2, 4), 4, 0, "must be at least 1")],
)
def test_mistakes(queries, count, k, message):
    with pytest.raises(ValueError, match=message):
        top_k(np.zeros(queries), np.zeros((count, 4)), k)


def test_what_is_not_finite_is_named():
    database = np.ones((20, 3), np.float32)
    database[7, 1] = np.nan
    with pytest.raises(ValueError, match="database image 7 is not finite"):
        top_k(np.ones((1, 3)), database, 1)
    with pytest.raises(ValueError, match="query 0 is not finite"):
        top_k(np.full((1, 3), np.inf), np.ones((20, 3)), 1)


def test_an_empty_database():
    scores, indices = top_k(np.ones((2, 3)), np.ones((0, 3), np.float32), 5)
    assert scores.shape == indices.shape == (2, 0)


@pytest.mark.parametrize("alike", [False, True])
def test_memory_does_not_grow_with_the_database(alike, monkeypatch):
    """Not even where all images tie."""
    monkeypatch.setattr(module, "ROWS_A_CHUNK", 2048)  # on any number of cores chunks are about as large for both
    rng = np.random.default_rng(1)
    database, peaks = rng.normal(size=(200_000, 8)).astype(np.float16), []
    database[:] = database[0] if alike else database
    for count in (50_000, 200_000):
        tracemalloc.start()
        top_k(rng.normal(size=(5, 8)).astype(np.float32), database[:count], 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]  # how the threads overlap makes a difference


def test_memory_does_not_grow_with_the_scores_of_all_queries(monkeypatch):
    """4,000 queries: their scores of one chunk are 260 MB a thread."""
    rng = np.random.default_rng(3)
    queries, database = (rng.normal(size=(count, 2)).astype(np.float32) for count in (4000, 16384))
    monkeypatch.setattr(module, "QUERIES_A_PASS", 2000)
    tracemalloc.start()
    top_k(queries, database, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def test_scores_that_float32_cannot_tell_apart(monkeypatch):
    """All images are almost one: which are the best is decided in float64, also among those seen chunks before."""
    rng = np.random.default_rng(2)
    database = np.ones((8000, 64), np.float32) + rng.normal(size=(8000, 64)).astype(np.float32) * np.float32(1.5e-7)
    query = rng.normal(size=(2, 64)).astype(np.float32)
    monkeypatch.setattr(module, "ROWS_A_CHUNK", 100)
    _, indices = top_k(query, database, 5)
    assert [row.tolist() for row in indices] == [order for order, _ in sorted_(query, database, 5)]
