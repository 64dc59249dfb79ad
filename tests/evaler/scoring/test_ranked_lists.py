"""What a page tells of a ranking: against sorting all of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaler.features.provenance import Provenance
from evaler.features.store import Features
from evaler.scoring.labels import score_labelled
from evaler.scoring.ranked_lists import RankedList, first_images, mean_curve, own_lists, revisited_lists
from evaler.scoring.revisited import LoadedSet, score_features
from revisitop.average_precision import average_precision
from revisitop.groundtruth import GroundTruth, Query
from revisitop.protocol import SETTINGS


def truth_of(roles):
    def indices(row, letter):
        return np.array([i for i, role in enumerate(row) if role == letter], np.int64)

    gnd = tuple(Query(None, *(indices(row, letter) for letter in "ehj")) for row in roles)
    return GroundTruth(tuple(f"i{i}" for i in range(len(roles[0]))), tuple(f"q{i}" for i in range(len(roles))), gnd)


@st.composite
def cases(draw):
    images, queries = draw(st.integers(1, 15)), draw(st.integers(1, 3))
    values = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    vectors = np.array([draw(values) for _ in range(queries + images)], np.float32)
    roles = [draw(st.lists(st.sampled_from("ehjn"), min_size=images, max_size=images)) for _ in range(queries)]
    return (
        vectors[:queries],
        vectors[queries:],
        roles,
        draw(st.integers(1, 16)),
        draw(st.randoms(use_true_random=False)),
    )


@settings(max_examples=100)
@given(cases(), st.booleans())
def test_a_revisited_ranking(case, reranked):
    queries, database, roles, top, random = case
    orders = [sorted(range(len(database)), key=lambda i: (-(query @ database[i]), i)) for query in queries]
    first = None
    if reranked:
        count = random.randint(1, len(database))
        orders = [random.sample(order[:count], count) + order[count:] for order in orders]
        first = np.array([order[:count] for order in orders])
    truth = truth_of(roles)
    loaded = LoadedSet(queries, database, first, Provenance())
    scored = score_features(loaded, truth)
    lists = revisited_lists(loaded, truth, {setting: scored[setting].per_query for setting in SETTINGS}, top=top)
    names = {"e": "easy", "h": "hard", "j": "junk", "n": "negative"}
    for query, order, row, one in zip(queries, orders, roles, lists, strict=True):
        assert [image for image, _, _ in one.found] == order[:top]
        assert [label for _, _, label in one.found] == [names[row[image]] for image in order[:top]]
        np.testing.assert_allclose([score for _, score, _ in one.found], database[order[:top]] @ query, atol=1e-6)
        later = [(image, rank, names[row[image]]) for rank, image in enumerate(order) if rank >= top]
        assert one.missed == [entry for entry in later if row[entry[0]] in "eh"]
        for setting, right in (("E", "e"), ("M", "eh"), ("H", "h")):
            kept = [row[image] for image in order if row[image] in right + "n"]
            assert one.ranks[setting] == [rank for rank, role in enumerate(kept) if role in right]
            if one.ranks[setting]:
                ap = 100 * average_precision(np.array(one.ranks[setting]), len(one.ranks[setting]))
                assert one.aps[setting] == pytest.approx(ap)
            else:
                assert one.aps[setting] is None


def test_more_results_than_were_reranked_and_fewer():
    loaded = LoadedSet(np.array([[1.0]]), np.array([[5.0], [4], [3], [2], [1]]), np.array([[2, 0, 1]]), Provenance())
    for top, wanted in ((2, [2, 0]), (4, [2, 0, 1, 3])):
        scores, found = first_images(loaded, top=top)
        assert found.tolist() == [wanted]
        assert scores.tolist() == [[5 - image for image in wanted]]


def described(vectors, names):
    vectors = np.asarray(vectors, np.float32)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Features(names, vectors, np.ones((len(names), 2), np.int32), Provenance())


def test_a_set_with_labels_leaves_the_query_out_and_its_ap_is_that_of_the_score():
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    names = [f"{i % 4}/{i}" for i in range(29)] + ["alone/29"]
    labels = {name: name.split("/")[0] for name in names}
    features = described(vectors, names)
    lists, score = own_lists(features, range(29), labels, top=5)
    assert score == score_labelled(features, labels)
    assert np.mean([one.aps["same"] for one in lists]) == pytest.approx(score["mAP"])
    scores = features.vectors @ features.vectors.T
    for query, one in enumerate(lists):
        order = [image for image in np.argsort(-scores[query], kind="stable").tolist() if image != query]
        same = [image % 4 == query % 4 and image != 29 for image in order]
        assert [image for image, _, _ in one.found] == order[:5]
        assert [label == "same" for _, _, label in one.found] == same[:5]
        assert one.ranks["same"] == np.flatnonzero(same).tolist()
        assert one.missed == [(order[rank], rank, "same") for rank in one.ranks["same"] if rank >= 5]


def test_a_set_without_labels():
    (one,), score = own_lists(described(np.eye(3) + 0.1, ["a", "b", "c"]), [1], None, top=9)
    assert score is None and one.ranks == one.aps == {} and one.missed == []
    assert [(image, label) for image, _, label in one.found] == [(0, ""), (2, "")]


def test_the_mean_curve_by_hand():
    def one(*ranks):
        return RankedList([], [], {"M": list(ranks)}, {"M": None})

    # Right at places 1 and 4: precision 1 to a recall of a half, then 2/4.
    curve = mean_curve([one(0, 3)], "M")
    assert curve[:51] == [1.0] * 51 and curve[51:] == [0.5] * 50
    # A later rise counts from the beginning: places 2 and 3 have 1/2 and 2/3. A query without right images is left out.
    assert mean_curve([one(1, 2), one()], "M") == pytest.approx([2 / 3] * 101)
    assert mean_curve([one(0, 3), one(1, 2)], "M")[100] == pytest.approx((0.5 + 2 / 3) / 2)
    assert mean_curve([one()], "M") == []
    # 7 of 10 is a recall of 0.7, though 0.7 * 10 is more than 7 in floats.
    assert mean_curve([one(0, 1, 2, 3, 4, 5, 6, 97, 98, 99)], "M")[70] == 1.0
