"""Metrics by hand, and against slower versions of themselves."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaler.scoring.ranked_metrics import (
    Prediction,
    average_precision,
    average_precision_at,
    average_precision_at_r,
    average_precisions_at,
    precisions_of_right,
    recall_at,
)


def mean_of(metric, *arguments):
    """mAP@k or GAP."""
    return np.mean(list(metric(*arguments).values()))


@pytest.mark.parametrize(
    ("found", "relevant", "k", "expected"),
    [
        ("abc", "abc", 100, 1),
        ("xyz", "abc", 100, 0),
        ("", "a", 100, 0),
        ("xaybz", "abc", 100, (1 / 2 + 2 / 4) / 3),
        ("xaybz", "abc", 3, (1 / 2) / 3),
        ("ab", "abcd", 2, 1),  # no more than k can be found
        ("aab", "ab", 100, (1 + 2 / 3) / 2),  # the second a is passed over, its place is lost
    ],
)
def test_average_precision_at_k(found, relevant, k, expected):
    assert average_precision_at(list(found), set(relevant), k) == pytest.approx(expected)


def test_queries_without_an_answer_count_as_zero_and_unknown_ones_are_refused():
    relevant = {"p": {"a"}, "q": {"b"}}
    assert mean_of(average_precisions_at, {"p": ["a"]}, relevant) == 0.5
    with pytest.raises(ValueError, match="1 queries are not in the solution, r for one"):
        average_precisions_at({"r": []}, relevant)
    with pytest.raises(ValueError, match="without relevant"):
        average_precision_at(["a"], set(), 5)


LANDMARKS = {"p": {"1"}, "q": {"2", "3"}, "r": {"4"}, "none": set()}


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ({"p": ("1", 3), "q": ("3", 2), "r": ("4", 1)}, 1),
        ({"p": ("1", 3), "q": ("3", 2), "r": ("4", 1), "none": ("9", 0)}, 1),
        ({"p": ("1", 3), "q": ("3", 2), "r": ("4", 1), "none": ("9", 9)}, (1 / 2 + 2 / 3 + 3 / 4) / 3),
        ({"p": ("9", 3), "q": ("2", 2)}, (1 / 2) / 3),
        ({"none": ("1", 3)}, 0),
        ({}, 0),
        ({"q": ("9", 1), "p": ("1", 1)}, 1 / 3),  # equally sure: by name, p first
    ],
)
def test_global_average_precision(predictions, expected):
    predictions = {query: Prediction(*values) for query, values in predictions.items()}
    assert mean_of(precisions_of_right, predictions, LANDMARKS) == pytest.approx(expected)


@given(
    st.lists(st.sets(st.sampled_from("abc")), min_size=1, max_size=8).filter(any),
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-2, 2)), min_size=8, max_size=8),
    st.sets(st.integers(0, 7)),
)
def test_global_average_precision_against_a_slower_one(landmarks, answers, silent):
    """With ties, queries that show nothing, and queries without an answer."""
    right = {f"q{i}": names for i, names in enumerate(landmarks)}
    predictions = {f"q{i}": Prediction(*answers[i]) for i in range(len(landmarks)) if i not in silent}
    total = 0.0
    for query, (landmark, confidence) in predictions.items():
        if landmark in right[query]:
            # Of all that are at least as sure, equally sure ones by name, the part that is right.
            before = [q for q, p in predictions.items() if (-p.confidence, q) <= (-confidence, query)]
            total += sum(predictions[q].landmark in right[q] for q in before) / len(before)
    expected = total / sum(bool(names) for names in landmarks)
    assert mean_of(precisions_of_right, predictions, right) == pytest.approx(expected)


def test_predictions_that_cannot_be_ranked():
    with pytest.raises(ValueError, match="x for one"):
        precisions_of_right({"x": Prediction("1", 1)}, LANDMARKS)
    with pytest.raises(ValueError, match="confidence of p is nan"):
        precisions_of_right({"p": Prediction("1", float("nan"))}, LANDMARKS)
    with pytest.raises(ValueError, match="no query of the solution"):
        precisions_of_right({}, {"none": set()})


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([0, 1, 2], (1, 1, 1)),
        ([1, 3], (0, (1 / 2 + 2 / 4) / 2, (1 / 2) / 2)),
        ([2, 3], (0, (1 / 3 + 2 / 4) / 2, 0)),
        ([0, 9], (1, (1 + 2 / 10) / 2, 1 / 2)),
    ],
)
def test_of_ranks(ranks, expected):
    ranks = np.array(ranks)
    assert (recall_at(ranks, 1), average_precision(ranks), average_precision_at_r(ranks)) == pytest.approx(expected)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranks_agree_with_lists(ranks):
    found = ["yes" + str(i) if i in ranks else "no" for i in range(41)]
    relevant = {"yes" + str(i) for i in ranks}
    array = np.array(sorted(ranks))
    assert average_precision(array) == pytest.approx(average_precision_at(found, relevant, 41))
    at_r = sum(len([j for j in ranks if j <= i]) / (i + 1) for i in ranks if i < len(ranks)) / len(ranks)
    assert average_precision_at_r(array) == pytest.approx(at_r)


def test_google_landmarks_by_its_official_code():
    """The numbers are of metrics.py of tensorflow/models (research/delf, google_landmarks_dataset) for these rankings:
    queries without landmark, without prediction, equal confidences, images found twice, queries with nothing found."""
    draw = random.Random(7)
    names = [f"q{i:02d}" for i in range(30)]
    landmarks = {q: {str(draw.randrange(4)) for _ in range(draw.randrange(3))} for q in names}
    taken = {q: Prediction(str(draw.randrange(4)), draw.randrange(8) / 8) for q in names if draw.random() < 0.8}
    relevant = {q: {f"i{draw.randrange(200)}" for _ in range(draw.randrange(1, 150))} for q in names[:12]}
    found = {q: [f"i{draw.randrange(200)}" for _ in range(draw.randrange(140))] for q in names[:11]}
    assert (len(taken), sum(map(bool, landmarks.values()))) == (25, 18)
    assert mean_of(precisions_of_right, taken, landmarks) == pytest.approx(0.15141345715335036, abs=1e-14)
    assert mean_of(average_precisions_at, found, relevant) == pytest.approx(0.08729380942573171, abs=1e-14)
    assert mean_of(average_precisions_at, found, relevant, 10) == pytest.approx(0.13937830687830685, abs=1e-14)
