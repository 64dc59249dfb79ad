"""Easy, Medium and Hard: who counts as what, the order of ties, distractors, and mistakes."""

import functools
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revisitop import groundtruth
from revisitop.average_precision import compute_map
from revisitop.protocol import evaluate
from revisitop.streamed_ranks import standings

EYE = np.eye(8)


def descending(count, dim=8):
    """A query and `count` images whose scores fall with their index."""
    database = np.zeros((count, dim))
    database[:, 0] = np.arange(count, 0, -1)
    return EYE[:1, :dim], database


def gnd(easy=(), hard=(), junk=()):
    return {"bbx": None, "easy": list(easy), "hard": list(hard), "junk": list(junk)}


def test_settings_by_hand():
    """Ranking 0 1 2 3 4 5 with easy 1, hard 3, junk 0, negatives 2 4 5."""
    queries, database = descending(6)
    result = evaluate(queries, database, [gnd(easy=[1], hard=[3], junk=[0])], (1, 2))
    # Easy: 0 and 3 are taken out, the positive comes first.
    assert result["E"]["mAP"] == 1 and result["E"]["mP@k"] == [1, 1]
    # Medium: 0 is taken out, the ranking is + - + - -.
    assert result["M"]["mAP"] == pytest.approx((1 + 1 + 1 / 2 + 2 / 3) / 4)
    assert result["M"]["mP@k"] == [1, 1 / 2]
    # Hard: 0 and 1 are taken out, the ranking is - + - -.
    assert result["H"]["mAP"] == pytest.approx((0 + 1 / 2) / 2)
    assert result["H"]["mP@k"] == [0, 1 / 2]


def test_perfect_and_worst():
    queries, database = descending(10)
    perfect = evaluate(queries, database, [gnd(easy=[0, 1], hard=[2])])
    # Easy loses nothing to the hard image, Hard nothing to the easy ones.
    assert [perfect[s]["mAP"] for s in "EMH"] == [1, 1, 1]
    worst = evaluate(-queries, database, [gnd(easy=[0])])
    assert worst["E"]["mAP"] == pytest.approx((0 + 1 / 10) / 2)
    assert worst["E"]["mP@k"] == [0, 0, 1 / 10]


def test_queries_without_positives_are_left_out():
    queries, database = descending(5)
    result = evaluate(np.repeat(queries, 2, axis=0), database, [gnd(hard=[0]), gnd(easy=[1])])
    assert math.isnan(result["E"]["aps"][0])
    assert result["E"]["mAP"] == result["E"]["aps"][1] == pytest.approx(0.25)
    assert result["H"]["mAP"] == 1
    empty = evaluate(queries, database, [gnd(junk=[0])])
    assert all(math.isnan(empty[s]["mAP"]) and all(map(math.isnan, empty[s]["mP@k"])) for s in "EMH")


def test_ties_go_to_the_smaller_index():
    database = np.tile(EYE[0], (40, 1))  # enough for an unstable sort to shuffle
    ranks = [found.ranks for found in standings(EYE[:1], database, [np.array([39, 0, 17])])]
    assert ranks[0].tolist() == [39, 0, 17]
    database[20:] = 2 * EYE[0]
    ranks = [found.ranks for found in standings(EYE[:1], database, [np.array([20, 39, 0, 19])])]
    assert ranks[0].tolist() == [0, 19, 20, 39]


def test_distractors_stand_after_the_database():
    queries, database = descending(4)
    labels = [gnd(easy=[1])]
    before = evaluate(queries, database, labels)["E"]["mAP"]
    lower = np.vstack([database, np.zeros((3, 8))])
    assert evaluate(queries, lower, labels)["E"]["mAP"] == before == pytest.approx(0.25)
    higher = np.vstack([database, 9 * EYE[:1], 9 * EYE[:1]])
    assert evaluate(queries, higher, labels)["E"]["mAP"] == pytest.approx((0 + 1 / 4) / 2)


def test_an_index_given_twice_is_found_once_as_in_the_published_metric():
    queries, database = descending(10)
    result = evaluate(queries, database, [gnd(easy=[1, 1, 4], junk=[0, 0])])
    mean, _, precisions, _ = compute_map(np.arange(10)[:, None], [{"ok": [1, 1, 4], "junk": [0, 0]}], (1, 5, 10))
    assert result["E"]["mAP"] == mean == pytest.approx((1 + 1 + 1 / 3 + 2 / 4) / 2 / 3)
    assert result["E"]["mP@k"] == precisions.tolist() == [1, 1 / 2, 1 / 2]


def test_chunks_of_the_database_change_nothing(monkeypatch):
    draw = np.random.default_rng(0)
    queries, database = draw.integers(-3, 4, (4, 6)), draw.integers(-3, 4, (50, 6))
    labels = [gnd(easy=[i], hard=[20 + i, 49], junk=[30]) for i in range(4)]
    whole = evaluate(queries, database, labels)
    small = functools.partial(standings, rows_a_chunk=7)
    monkeypatch.setattr("revisitop.protocol.standings", small)
    parts = evaluate(queries, database, labels)
    for setting in "EMH":
        np.testing.assert_array_equal(whole[setting]["aps"], parts[setting]["aps"])
        assert whole[setting]["mAP_bracket"] == parts[setting]["mAP_bracket"]


def test_the_bracket_by_hand():
    """Scores 2 1 1 1 0: positive 1, negatives 0 2, junk 3 (all three at 1 tie), positive 4."""
    queries, database = np.ones((1, 1)), np.array([[2.0], [1], [1], [1], [0]])
    result = evaluate(queries, database, [gnd(easy=[1, 4], junk=[3])])
    best = ((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2
    worst = ((0 + 1 / 3) / 2 + (1 / 3 + 2 / 4) / 2) / 2
    assert result["E"]["mAP_bracket"] == pytest.approx([worst, best])
    assert result["E"]["mAP"] == pytest.approx(best)  # the smaller index first
    assert result["M"]["mAP_bracket"] == result["E"]["mAP_bracket"]
    assert np.isnan(result["H"]["mAP_bracket"]).all()


def test_a_loaded_ground_truth_gives_the_same_as_its_list(tmp_path):
    draw = np.random.default_rng(1)
    queries, database = draw.normal(size=(2, 6)).astype(np.float32), draw.normal(size=(9, 6)).astype(np.float32)
    labels = [gnd(easy=[3, 1], hard=[8], junk=[0]), gnd(easy=[2], junk=[5])]
    path = tmp_path / "gnd_x.pkl"
    path.write_bytes(pickle.dumps({"imlist": list("abcdefghi"), "qimlist": ["q", "r"], "gnd": labels}))
    truth = groundtruth.load(path)
    for a, b in ((truth, labels), (truth.gnd, labels)):
        first, second = evaluate(queries, database, a), evaluate(queries, database, b)
        for setting in "EMH":
            np.testing.assert_array_equal(first[setting]["aps"], second[setting]["aps"])
            np.testing.assert_array_equal(first[setting]["mP@k"], second[setting]["mP@k"])


@pytest.mark.parametrize(
    ("queries", "database", "labels", "message"),
    [
        (np.ones((1, 3)), np.ones((5, 4)), [gnd()], "not .Q, D. and .N, D."),
        (np.ones(3), np.ones((5, 3)), [gnd()], "not .Q, D. and .N, D."),
        (np.ones((2, 3)), np.ones((5, 3)), [gnd()], "2 query descriptors for a ground truth of 1 queries"),
        (np.ones((1, 3)), np.ones((5, 3)), [gnd(easy=[5])], "query 0: easy holds an index outside the 5"),
        (np.ones((1, 3)), np.ones((5, 3)), [gnd(junk=[-1])], "query 0: junk holds an index outside the 5"),
        (np.full((1, 3), np.nan), np.ones((5, 3)), [gnd()], "not finite"),
        (np.ones((1, 3)), np.full((5, 3), np.inf), [gnd()], "not finite"),
    ],
)
def test_mistakes_are_refused(queries, database, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(queries, database, labels)


def naive_ap(scores, positives, junk):
    """AP of one query: sort pairs, drop the junk, walk down."""
    if not positives:
        return math.nan
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    order = [i for i in order if i not in junk or i in positives]
    area, hits = 0.0, 0
    for place, image in enumerate(order):
        if image in positives:
            area += ((hits / place if place else 1.0) + (hits + 1) / (place + 1)) / 2
            hits += 1
    return area / len(positives)


@st.composite
def cases(draw):
    images, queries, dim = draw(st.integers(1, 20)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    values = st.integers(-2, 2)  # few of them, so that many scores tie
    vectors = [draw(st.lists(values, min_size=dim, max_size=dim)) for _ in range(queries + images)]
    roles = [draw(st.lists(st.sampled_from("ehjn"), min_size=images, max_size=images)) for _ in range(queries)]
    return np.array(vectors[:queries]), np.array(vectors[queries:]), roles


@settings(deadline=None, max_examples=300)
@given(cases())
def test_equals_the_naive_protocol_with_ties(case):
    queries, database, roles = case
    labels = [gnd(*([i for i, role in enumerate(row) if role == key] for key in "ehj")) for row in roles]
    result = evaluate(queries, database, labels)
    for kind in (np.float16, np.float32):  # small whole numbers are exact in all of them
        other = evaluate(queries.astype(kind), database.astype(kind), labels)
        for setting in "EMH":
            np.testing.assert_array_equal(other[setting]["aps"], result[setting]["aps"])
    for q, label in enumerate(labels):
        easy, hard, junk = set(label["easy"]), set(label["hard"]), set(label["junk"])
        scores = [sum(int(a) * int(b) for a, b in zip(queries[q], image, strict=True)) for image in database]
        for setting, good, bad in (("E", easy, junk | hard), ("M", easy | hard, junk), ("H", hard, junk | easy)):
            assert result[setting]["aps"][q] == pytest.approx(naive_ap(scores, good, bad), abs=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=100)
@given(cases(), st.randoms(use_true_random=False), st.integers(1, 20))
def test_after_reranking_the_first_stand_as_told_and_the_others_as_before(case, random, count):
    queries, database, roles = case
    labels = [gnd(*([i for i, role in enumerate(row) if role == key] for key in "ehj")) for row in roles]
    orders = [sorted(range(len(database)), key=lambda i: (-(database[i] @ query), i)) for query in queries]
    count = min(count, len(database))
    first = np.array([random.sample(order[:count], count) for order in orders])
    result = evaluate(queries, database, labels, first=first)
    for q, label in enumerate(labels):
        order = [*first[q].tolist(), *orders[q][count:]]
        scores = [-order.index(image) for image in range(len(database))]
        good, bad = {*label["easy"], *label["hard"]}, set(label["junk"])
        assert result["M"]["aps"][q] == pytest.approx(naive_ap(scores, good, bad), abs=1e-12, nan_ok=True)
    assert result["M"]["mAP_bracket"] == pytest.approx([result["M"]["mAP"]] * 2, nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_the_bracket_is_that_of_all_orders(case):
    queries, database, roles = case
    labels = [gnd(*([i for i, role in enumerate(row) if role == key] for key in "ehj")) for row in roles[:1]]
    queries = queries[:1]
    result = evaluate(queries, database, labels)
    easy, junk = set(labels[0]["easy"]), set(labels[0]["junk"]) | set(labels[0]["hard"])
    scores = (database @ queries[0]).tolist()
    if not easy:
        assert np.isnan(result["E"]["mAP_bracket"]).all()
        return
    found = []
    for key in itertools.product(range(2), repeat=min(len(scores), 7)):  # of each image: before its equals, or behind
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], key[i] if i < 7 else 0, i))
        found.append(naive_ap([-order.index(i) for i in range(len(scores))], easy, junk))
    low, high = result["E"]["mAP_bracket"]
    assert low - 1e-12 <= min(found) and max(found) <= high + 1e-12
    if len(scores) <= 7:
        assert (low, high) == pytest.approx((min(found), max(found)))
