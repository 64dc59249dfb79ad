"""The result card: what it says, and when it stands beside published numbers."""

import pytest

from evaler.features.provenance import Provenance
from evaler.scoring.card import COMPLETE, line, make_card, published, with_distractors
from revisitop.groundtruth import OFFICIAL_SHA256

PROVENANCE = {
    "weights": "/w/model.pyth",
    "weights_sha256": "abcdef012345" * 5,
    "depth": 101,
    "with_ma": True,
    "fusion": "orthogonal",
    "scales": [0.3535, 0.5, 0.7071, 1.0, 1.4142],
    "crop_query": True,
    "precision": "fp32",
    "resize": "bilinear",
    "code_version": "0123abc",
}


def card(name="roxford5k", distractors=0, sha256=OFFICIAL_SHA256["roxford5k"], post=(), **provenance):
    manifest = {"provenance": Provenance.from_json(PROVENANCE | provenance), "count": 3, "dim": 8, "dtype": "float32"}
    more = {"queries": 70, "distractors": distractors, "ground_truth_sha256": sha256, "post_processing": post}
    return make_card(name, manifest, **more)


def test_it_holds_everything_a_reader_has_to_know():
    assert line(card() | {"scored_by": "456"}) == (
        "roxford5k | R101 orthogonal MA | weights abcdef01 | queries cropped | 5 scales | fp32 bilinear | "
        "8-d float32 | no post-processing | labels ba796775 | code 0123abc, 456"
    )
    text = line(card(crop_query=False, sha256="0" * 64, post=["PCA 256", "aQE 3"]))
    assert "queries not cropped" in text and "NOT the official labels" in text and "PCA 256 + aQE 3" in text
    bare = make_card(
        "mine",
        {"provenance": Provenance(), "count": 0, "dim": 4, "dtype": "float16"},
        queries=1,
        distractors=5,
        ground_truth_sha256="1" * 64,
        post_processing=(),
    )
    assert bare["distractors"] == 5 and bare["ground_truth_official"] is None
    assert "network unknown | weights unknown | crop unknown | scales unknown | precision unknown | 4-d" in line(bare)


@pytest.mark.parametrize("count", [1, 250, COMPLETE - 1, COMPLETE + 1])
def test_only_the_complete_set_is_1m(count):
    assert "+1M" not in with_distractors(count) and f"{count:,} distractors" in with_distractors(count)
    assert published(card(distractors=count)) is None


def test_published_numbers():
    assert with_distractors(COMPLETE) == "+1M" and with_distractors(0) == ""
    assert published(card()) == (82.37, 64.93)
    assert published(card(distractors=COMPLETE)) == (73.63, 51.57)
    assert published(card("rparis6k", depth=50, crop_query=False)) == (90.94, 80.48)


@pytest.mark.parametrize(
    "other", [{"depth": 18}, {"fusion": "global"}, {"scales": [1.0]}, {"crop_query": None}, {"post": ["x"]}]
)
def test_what_was_measured_otherwise_has_none_beside_it(other):
    assert published(card(**other)) is None
    assert published(card("toy")) is None


def test_another_backbone_is_named_and_has_no_published_score():
    other = card(backbone="plain", depth=101)
    assert other["backbone"] == "plain" and " | plain 101 orthogonal" in line(other)
    assert published(other) is None and published(card(depth=101)) is not None
    assert "backbone" not in card(depth=101), "cards of a ResNet are as they were"
