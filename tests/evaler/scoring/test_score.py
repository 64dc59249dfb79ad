"""The one score record: three protocols write it, compare.py reads them all, and the files of older versions."""

import json
import pickle

import numpy as np
import pytest

from evaler.features.provenance import Provenance
from evaler.features.store import Features, Rejected, save
from evaler.scoring import card, comparison, gldv2, labels, revisited
from evaler.scoring.score import Score, ScoreError, read
from tests.evaler.scoring.test_labels import angles, features

# What evaluate.py of the version before wrote of `tiny_set`, but for the provenance and the sha256 of the ground truth.
OLD = """{
 "unit": "percent",
 "dataset": "tiny",
 "kappas": [
  1,
  5,
  10
 ],
 "queries": 2,
 "database": 3,
 "E": {
  "mAP": 100.0,
  "mAP_bracket": [
   100.0,
   100.0
  ],
  "mP@k": [
   100.0,
   100.0,
   100.0
  ],
  "aps": [
   100.0,
   null
  ]
 },
 "M": {
  "mAP": 58.333333333333336,
  "mAP_bracket": [
   58.333333333333336,
   62.5
  ],
  "mP@k": [
   50.0,
   66.66666666666666,
   66.66666666666666
  ],
  "aps": [
   100.0,
   16.666666666666664
  ]
 },
 "H": {
  "mAP": 58.333333333333336,
  "mAP_bracket": [
   58.333333333333336,
   62.5
  ],
  "mP@k": [
   50.0,
   66.66666666666666,
   66.66666666666666
  ],
  "aps": [
   100.0,
   16.666666666666664
  ]
 },
 "provenance": {
  "crop_query": true,
  "scales": [
   0.5,
   1.0
  ],
  "weights": "/w/model.pyth",
  "weights_sha256": "ab"
 },
 "query_names": [
  "q0",
  "q1"
 ],
 "ground_truth_sha256": "TRUTH",
 "card": {
  "set": "tiny",
  "queries": 2,
  "gallery": 3,
  "distractors": 0,
  "queries_cropped": true,
  "scales": [
   0.5,
   1.0
  ],
  "precision": null,
  "resize": null,
  "depth": null,
  "fusion": null,
  "with_ma": null,
  "weights": "/w/model.pyth",
  "weights_sha256": "ab",
  "dim": 3,
  "dtype": "float32",
  "post_processing": [],
  "ground_truth_sha256": "TRUTH",
  "ground_truth_official": null,
  "extracted_by": null,
  "scored_by": "456"
 }
}
"""
NEW_KEYS = {"protocol": "revisited", "metric": "mAP", "settings": {"E": "Easy", "M": "Medium", "H": "Hard"}}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The score of `tiny`, as written."""
    monkeypatch.setattr(card, "code_version", lambda: "456")
    truth = tmp_path / "data" / "tiny" / "gnd_tiny.pkl"
    truth.parent.mkdir(parents=True)
    images = ["a/1.jpg", "a/2.jpg", "b/3.jpg"]
    of_query = [
        {"bbx": [0, 0, 9, 9], "easy": [1], "hard": [2], "junk": [0]},
        {"bbx": None, "easy": [], "hard": [2], "junk": []},
    ]
    truth.write_bytes(pickle.dumps({"imlist": images, "qimlist": ["q0", "q1"], "gnd": of_query}))
    vectors = np.array([[0.6, 0.8, 0], [0, 0.6, 0.8], [0.8, 0, 0.6]], np.float32)
    how = Provenance(weights="/w/model.pyth", weights_sha256="ab", scales=(0.5, 1.0), crop_query=True)
    for collection, names in (("database", images), ("queries", ["q0", "q1"])):
        sizes = np.full((len(names), 2), 9, np.int32)
        save(tmp_path / "features" / "tiny", collection, Features(names, vectors[: len(names)], sizes, how))
    return revisited.score_set("tiny", tmp_path / "data", tmp_path)[1]


def compared(capsys, *arguments):
    """What the command prints, and what it writes."""
    written = arguments[0].parent / "difference.json"
    comparison.main([*map(str, arguments), "--json", str(written)])
    return capsys.readouterr().out, json.loads(written.read_text())


def test_a_revisited_score_keeps_its_form_and_gains_three_keys(tiny, capsys):
    record = json.loads(tiny.read_text())
    old = tiny.with_name("old.json")
    old.write_text(OLD.replace("TRUTH", record["ground_truth_sha256"]))
    assert record == json.loads(old.read_text()) | NEW_KEYS
    added = ["protocol", "metric", "settings"]
    assert list(record)[-3:] == added and tiny.read_text().startswith(old.read_text().removesuffix("\n}\n") + ",\n")
    assert read(old) == read(tiny)  # a file of the version before, and one of this
    assert read(tiny).to_json() == record and list(read(tiny).to_json()) == list(record)
    out, difference = compared(capsys, old, tiny)
    assert "Medium     58.33   58.33    +0.00" in out and difference["M"]["difference"]["queries"] == 2


def test_scores_by_labels_are_compared(tmp_path, capsys):
    names = ["a/1", "a/2", "b/1", "b/2", "c/1"]
    for run, degrees in (("one", (0, 30, 10, 50, 85)), ("two", (0, 5, 40, 50, 85))):
        save(tmp_path / run / "photos", "images", features(names, angles(*degrees)))
        labels.main([str(tmp_path / run / "photos"), "--json", str(tmp_path / f"{run}.json")])
    capsys.readouterr()
    score = read(tmp_path / "one.json")
    assert score.protocol == "labels" and score.query_names == names and score.card["gallery"] == 5
    setting = score.settings["same"]
    assert setting.per_query == [pytest.approx(100 / n) if n else None for n in (2, 3, 3, 3, 0)]
    counted = [value for value in setting.per_query if value is not None]
    assert setting.values["mAP"] == pytest.approx(np.mean(counted)) and setting.counted == 4
    assert list(score.columns("same")) == ["recall@1", "recall@5", "recall@10", "mAP", "mAP@R"]
    record = json.loads((tmp_path / "one.json").read_text())
    assert record["mAP"] == setting.values["mAP"] and (record["queries"], record["alone"]) == (4, 1)  # as it was
    out, difference = compared(capsys, tmp_path / "one.json", tmp_path / "two.json")
    assert "Same label" in out and "queries that changed most (AP)" in out
    assert difference["same"]["difference"]["b"] == 100 and difference["same"]["difference"]["better"] == 4
    # Other labels: not the same question.
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{name},x\n" for name in names))
    labels.main(
        [str(tmp_path / "two" / "photos"), "--labels", str(tmp_path / "l.csv"), "--json", str(tmp_path / "x.json")]
    )
    with pytest.raises(SystemExit):
        comparison.main([str(tmp_path / "one.json"), str(tmp_path / "x.json")])
    assert "cannot be compared: ground_truth_sha256 is" in capsys.readouterr().err


def gldv2_scores(tmp_path, task, solution):
    """The scores of two runs, whose queries lie at other angles."""
    (tmp_path / "s.csv").write_text(solution)
    index = [f"{i:016d}" for i in range(4)]
    (tmp_path / "l.csv").write_text(f"landmark_id,images\n7,{index[0]} {index[1]}\n9,{index[2]}\n1,{index[3]}\n")
    paths = []
    for run, degrees in (("one", (0, 40, 80)), ("two", (0, 33, 80))):
        queries = features(["aaa1.jpg", "bbb1.jpg", "ddd1.jpg"], angles(*degrees))
        queries.rejected.append(Rejected(3, "eee1.jpg", "truncated"))
        save(tmp_path / run / "test", "images", queries)
        save(tmp_path / run / "index", "images", features([f"{i}.jpg" for i in index], angles(5, 30, 45, 88)))
        paths.append(tmp_path / f"{run}.json")
        more = ["--labels", str(tmp_path / "l.csv"), "--voting", "1"] if task == "recognition" else []
        places = [str(tmp_path / "s.csv"), *(str(tmp_path / run / name) for name in ("test", "index"))]
        gldv2.main([task, *places, *more, "--json", str(paths[-1])])
    return paths


def test_retrieval_of_gldv2_is_compared(tmp_path, capsys):
    x = [f"{i:016d}" for i in range(4)]
    solution = f"id,images,Usage\naaa1,{x[0]},Public\nbbb1,{x[1]},Private\nddd1,{x[3]},Private\neee1,{x[0]},Private\n"
    one, two = gldv2_scores(tmp_path, "retrieval", solution)
    capsys.readouterr()
    score = read(one)
    assert score.protocol == "gldv2 retrieval" and score.metric == "mAP@100"
    assert score.settings["Public"].per_query == [100, None, None, None]
    assert score.settings["Private"].per_query == [None, 50, 100, 0]  # a rejected query finds nothing
    record = json.loads(one.read_text())  # as it was
    assert (record["task"], record["rejected"], record["searched"]) == ("retrieval", {"Public": 0, "Private": 1}, 4)
    assert record["scores"] == {"Public": 100, "Private": 50} and record["metric"] == "mAP@100"
    out, difference = compared(capsys, one, two)
    assert "Private    50.00   66.67   +16.67" in out and "queries that changed most (AP@100)" in out
    assert difference["Private"]["queries"][0] == ["bbb1", 50, 100]


def test_recognition_of_gldv2_is_compared(tmp_path, capsys):
    """bbb1 is 9 by the nearest image at 40 degrees, and 7 at 33: surer than aaa1 is, whose precision falls."""
    solution = "id,landmarks,Usage\naaa1,7,Public\nbbb1,9,Public\nddd1,,Public\neee1,7,Public\n"
    one, two = gldv2_scores(tmp_path, "recognition", solution)
    capsys.readouterr()
    score = read(one)
    assert score.settings["Public"].per_query == [100, 100, None, 0] and score.card["voting"] == 1
    assert score.settings["Public"].values["GAP"] == pytest.approx(200 / 3)
    out, _ = compared(capsys, one, two)
    assert "Public     66.67   16.67   -50.00" in out and "queries that changed most (GAP)" in out
    retrieval = Score.from_json(json.loads(one.read_text()) | {"protocol": "gldv2 retrieval"}, "here")
    with pytest.raises(ValueError, match="protocol is gldv2 recognition in one, gldv2 retrieval in the other"):
        comparison.compare(score, retrieval)


@pytest.mark.parametrize(
    "old",
    [
        {"recall@1": 1.0, "mAP": 2.0, "unit": "percent", "queries": 4, "provenance": {}},
        {"task": "retrieval", "metric": "mAP@100", "unit": "percent", "scores": {"Public": 1.0}, "searched": 4},
    ],
)
def test_older_scores_without_values_of_queries_are_refused_in_one_line(tmp_path, old):
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(
        ScoreError, match="old.json: not a score with the values of each query .* score again"
    ) as caught:
        read(tmp_path / "old.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {}},
        {"settings": ["E"]},
        {"settings": {"E": 1}},
        {"settings": {"X": "x"}},
        {"protocol": 1},
        {"metric": None},
        {"dataset": []},
        {"provenance": []},
        {"card": []},
        {"query_names": [1, 2]},
        {"E": []},
    ],
)
def test_what_is_no_score(tiny, change):
    with pytest.raises(ScoreError, match="^here: not a score of evaler/evaluate"):
        Score.from_json(json.loads(tiny.read_text()) | change, "here")
