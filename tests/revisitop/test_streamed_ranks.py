"""Ranks by counting: equal to those by sorting, whatever the chunks, the type and the ties."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revisitop.streamed_ranks import standings


def naive(queries, database, wanted):
    """Scores by the definition, one at a time, and a stable sort."""
    for query, images in zip(queries.astype(np.float64), wanted, strict=True):
        scores = np.array([(row.astype(np.float64) * query).sum() for row in database])
        order = np.argsort(-scores, kind="stable").tolist()
        yield [
            ((scores > scores[i]).sum(), (scores[:i] == scores[i]).sum(), (scores == scores[i]).sum(), order.index(i))
            for i in images
        ]


def as_rows(found):
    return [list(zip(s.above, s.before, s.equal, s.ranks, strict=True)) for s in found]


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["f2", "f4", "f8"]), st.integers(1, 40), st.integers(1, 45))
def test_equal_to_sorting(seed, kind, count, chunk):
    """Near-equal scores as well as equal ones: rows are copied, and copied with the last bit changed."""
    rng = np.random.default_rng(seed)
    queries, database = rng.normal(size=(3, 16)).astype(kind), rng.normal(size=(count, 16)).astype(kind)
    for _ in range(count // 2):
        source, target = rng.integers(0, count, 2)
        database[target] = database[source]
        if rng.random() < 0.5:
            column = rng.integers(16)
            database[target, column] = np.nextafter(database[target, column], np.array(9, kind))
    wanted = [rng.integers(0, count, rng.integers(0, 9)) for _ in queries]
    assert as_rows(standings(queries, database, wanted, rows_a_chunk=chunk)) == list(naive(queries, database, wanted))


def test_equal_descriptors_tie_wherever_they_lie():
    rng = np.random.default_rng(0)
    queries, database = (rng.normal(size=size).astype(np.float32) for size in ((5, 512), (1000, 512)))
    database[[3, 500, 999]] = database[77]
    for chunk in (1, 7, 64, 1000):
        for found in standings(queries, database, [np.array([3, 77, 500, 999])] * 5, rows_a_chunk=chunk):
            assert found.equal.tolist() == [4] * 4 and found.before.tolist() == [0, 1, 2, 3]
            assert len(set(found.above.tolist())) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_lengths_that_float32_cannot_square(scale):
    rng = np.random.default_rng(1)
    queries, database = rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(50, 8))
    wanted = [np.arange(9), np.arange(20, 25)]
    expected = list(naive(queries, (database * scale).astype(np.float32), wanted))
    found = standings(queries, (database * scale).astype(np.float32), wanted, rows_a_chunk=16)
    assert as_rows(found) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_what_is_not_finite_is_named(bad, kind):
    queries, database = np.ones((3, 4), kind), np.ones((50, 4), kind)
    database[33, 1] = bad
    with pytest.raises(ValueError, match="the descriptor of database image 33 is not finite"):
        standings(queries, database, [np.array([1])] * 3, rows_a_chunk=8)
    queries[2, 0] = bad
    with pytest.raises(ValueError, match="the descriptor of query 2 is not finite"):
        standings(queries, database, [np.array([1])] * 3)


def test_memory_does_not_grow_with_the_database():
    peaks = []
    rng = np.random.default_rng(2)
    database = rng.normal(size=(40_000, 32)).astype(np.float32)
    queries, wanted = database[:20], [np.arange(30)] * 20
    for count in (10_000, 40_000):
        tracemalloc.start()
        standings(queries, database[:count], wanted, rows_a_chunk=1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] < 40_000 * 20 * 4


class AsItGoes:
    """Makes descriptors when they are read, with other last bits for other slices."""

    def __init__(self, rows):
        self._rows, self.shape = rows, rows.shape

    def __getitem__(self, rows):
        return self._rows[rows] * np.float32(1 + 1e-6 * (rows.start % 3) + 1e-6 * (rows.stop - rows.start))


def test_an_image_is_not_above_itself_where_rows_are_made_as_they_are_read():
    rng = np.random.default_rng(4)
    database = rng.normal(size=(50, 8)).astype(np.float32)
    found = standings(database[:5], AsItGoes(database), [np.arange(50)] * 5, rows_a_chunk=8)
    for standing in found:
        assert sorted(standing.ranks) == list(range(50)) and (standing.equal == 1).all()


def test_longer_descriptors_in_a_later_chunk_are_as_exact():
    """Products with long descriptors are far off in float32, also where those seen before were short."""
    rng = np.random.default_rng(5)
    query = rng.normal(size=(1, 64)).astype(np.float32)
    short = rng.normal(size=(20, 64)).astype(np.float32)
    across = rng.normal(size=(200, 64)) * 1e4
    across -= np.outer(across @ query[0] / (query[0] @ query[0]), query[0])
    database = np.concatenate([short, (across + short[rng.integers(0, 20, 200)]).astype(np.float32)])
    wanted = [np.arange(20)]
    assert as_rows(standings(query, database, wanted, rows_a_chunk=20)) == list(naive(query, database, wanted))
