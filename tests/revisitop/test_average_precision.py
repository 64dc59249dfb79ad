"""The metric against known values, the published function's results, and a slow version of itself."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revisitop.average_precision import average_precision, compute_map, precision_at, without_junk

CASES = json.loads((Path(__file__).resolve().parents[1] / "goldens" / "eval_unit.json").read_text())
# The published function raises on the others; what ours does there is tested by itself.
GOLDENS = [case for case in CASES if "raises" not in case["expected"]]


def naive(ranking, ok, junk, kappas):
    """AP and P@k of one query by walking down the list, as the benchmark's paper describes it."""
    if not ok:
        return math.nan, [math.nan] * len(kappas)
    place, hits, area, last = 0, 0, 0.0, 0
    hit_places = []
    for image in ranking:
        if image in ok:
            precision_before = hits / place if place else 1.0
            hits += 1
            place += 1
            area += (precision_before + hits / place) / 2
            hit_places.append(place)
            last = place
        elif image not in junk:
            place += 1
    precisions = []
    for kappa in kappas:
        k = min(kappa, last)
        precisions.append(sum(p <= k for p in hit_places) / k if k else 0.0)
    return area / len(ok), precisions


@pytest.mark.parametrize("case", GOLDENS, ids=[case["name"] for case in GOLDENS])
def test_golden(case):
    ranks = np.array(case["ranks_per_query"]).T
    mean, aps, precisions, per_query = compute_map(ranks, case["gnd"], case["kappas"])
    expected = {
        key: np.array([np.nan if value is None else value for value in np.atleast_1d(case["expected"][key])], float)
        for key in ("map", "aps", "pr", "prs")
    }
    for key, got in (("map", [mean]), ("aps", aps), ("pr", precisions), ("prs", per_query.ravel())):
        np.testing.assert_allclose(got, expected[key], rtol=0, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("ranks", "positives", "expected"),
    [
        ([0, 1, 2], 3, 1.0),  # perfect
        ([1], 1, (0 + 1 / 2) / 2),
        ([0, 2], 2, (1 + 1 + 1 / 2 + 2 / 3) / 4),
        ([9], 1, (0 + 1 / 10) / 2),  # worst of ten
        ([0], 2, 0.5),  # one of two found
        ([], 2, 0.0),  # none found
    ],
)
def test_average_precision_by_hand(ranks, positives, expected):
    assert average_precision(np.array(ranks, dtype=int), positives) == pytest.approx(expected, abs=1e-15)


def test_junk_is_taken_out():
    got = without_junk(np.array([4, 1, 8]), np.array([9, 2, 0, 3]))
    assert got.tolist() == [0, 1, 5]


def test_precision_is_not_held_against_what_follows_the_last_positive():
    assert precision_at(np.array([0]), (1, 5, 10)).tolist() == [1, 1, 1]
    assert precision_at(np.array([0, 3]), (1, 2, 5)).tolist() == [1, 1 / 2, 2 / 4]
    assert precision_at(np.array([6]), (1, 5, 10)).tolist() == [0, 0, 1 / 7]
    assert precision_at(np.array([], dtype=int), (1, 5)).tolist() == [0, 0]


def test_nothing_to_find_is_not_a_number():
    mean, aps, precisions, per_query = compute_map(np.arange(5)[:, None], [{"ok": [], "junk": [1]}], [1, 5])
    assert math.isnan(mean) and np.isnan(aps).all() and np.isnan(precisions).all() and np.isnan(per_query).all()
    assert (aps.shape, precisions.shape, per_query.shape) == ((1,), (2,), (1, 2))


def test_nothing_found_in_a_cut_ranking_is_zero():
    mean, _, precisions, _ = compute_map(np.arange(3)[:, None], [{"ok": [8], "junk": []}], [1, 5])
    assert mean == 0 and precisions.tolist() == [0, 0]


def test_all_others_junk_is_perfect():
    mean, _, precisions, _ = compute_map(np.arange(6)[:, None], [{"ok": [5], "junk": [0, 1, 2, 3, 4]}], [1, 5])
    assert mean == 1 and precisions.tolist() == [1, 1]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="2 queries need ranks of shape"):
        compute_map(np.arange(5)[:, None], [{"ok": [1]}, {"ok": [2]}], [1])
    with pytest.raises(ValueError, match="k of at least 1"):
        compute_map(np.arange(5)[:, None], [{"ok": [1]}], [0])


@st.composite
def rankings(draw):
    images = draw(st.integers(1, 25))
    queries = draw(st.integers(1, 4))
    ranks = np.array([draw(st.permutations(range(images))) for _ in range(queries)]).T
    roles = st.lists(st.sampled_from(["ok", "junk", "negative"]), min_size=images, max_size=images)
    gnd = []
    for _ in range(queries):
        role = draw(roles)
        gnd.append({key: [i for i in range(images) if role[i] == key] for key in ("ok", "junk")})
    return ranks, gnd, draw(st.lists(st.integers(1, 30), max_size=4))


@settings(deadline=None, max_examples=300)
@given(rankings())
def test_equals_the_naive_metric(case):
    ranks, gnd, kappas = case
    mean, aps, precisions, per_query = compute_map(ranks, gnd, kappas)
    expected = [
        naive(ranking.tolist(), set(labels["ok"]), set(labels["junk"]), kappas)
        for ranking, labels in zip(ranks.T, gnd, strict=True)
    ]
    np.testing.assert_allclose(aps, [ap for ap, _ in expected], atol=1e-12)
    np.testing.assert_allclose(per_query, np.reshape([p for _, p in expected], (len(gnd), len(kappas))), atol=1e-12)
    counted = [(ap, p) for ap, p in expected if not math.isnan(ap)]
    if counted:
        assert mean == pytest.approx(sum(ap for ap, _ in counted) / len(counted), abs=1e-12)
        np.testing.assert_allclose(precisions, np.mean([p for _, p in counted], axis=0), atol=1e-12)
    else:
        assert math.isnan(mean)
