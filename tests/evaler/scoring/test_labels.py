"""A labelled set, leaving one out: by hand, against a loop, and through the command."""

import json
import subprocess
import sys

import numpy as np
import pytest

from evaler.features.provenance import Provenance
from evaler.features.store import Features, save
from evaler.scoring.labels import labels_of_folders, main, read_labels, score_labelled
from tests.small_run import ROOT, child_environment


def features(names, vectors):
    vectors = np.asarray(vectors, np.float32)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Features(list(names), vectors, np.full((len(names), 2), 9, np.int32), Provenance(weights_sha256="a"))


def angles(*degrees):
    return [[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees]


NAMES = ["a/1", "a/2", "b/1", "b/2", "c/1"]
SET = features(NAMES, angles(0, 30, 10, 50, 85))


def test_by_hand():
    """Nearest first. a/1 at 0: b/1 a/2 b/2 c; a/2 at 30: b/1 b/2 ... at 20 and 20: the smaller index; then a/1 at 30;
    b/1 at 10: a/1 a/2 b/2 c; b/2 at 50: a/2 c b/1 a/1; c is alone."""
    score = score_labelled(SET, labels_of_folders(NAMES), kappas=(1, 2, 3))
    assert (score["queries"], score["alone"], score["images"], score["labels"]) == (4, 1, 5, 3)
    assert score["recall@1"] == 0 and score["recall@2"] == 25 and score["recall@3"] == 100
    assert score["mAP"] == pytest.approx(100 * (1 / 2 + 1 / 3 + 1 / 3 + 1 / 3) / 4) and score["mAP@R"] == 0


def test_perfect_and_all_equal():
    perfect = features(["a/1", "a/2", "b/1", "b/2"], angles(0, 1, 80, 81))
    score = score_labelled(perfect, labels_of_folders(perfect.names))
    assert [score[key] for key in ("recall@1", "mAP", "mAP@R")] == [100] * 3
    equal = features(["a/1", "b/1", "a/2", "b/2"], angles(0, 0, 0, 0))
    score = score_labelled(equal, labels_of_folders(equal.names), kappas=(1, 2))
    # a/1: b/1 a/2; b/1: a/1 a/2 b/2; a/2: a/1 first; b/2: a/1 b/1
    assert score["recall@1"] == 25 and score["mAP"] == pytest.approx(100 * (1 / 2 + 1 / 3 + 1 + 1 / 2) / 4)


def test_against_a_loop():
    rng = np.random.default_rng(0)
    names = [f"{rng.integers(6)}/{i}" for i in range(40)]
    some = features(names, rng.normal(size=(40, 4)))
    labels = labels_of_folders(names)
    aps, at_r = [], []
    for i, name in enumerate(names):
        scores = some.vectors.astype(np.float64) @ some.vectors[i].astype(np.float64)
        right = [labels[names[j]] == labels[name] for j in np.argsort(-scores, kind="stable") if j != i]
        if any(right):
            precision = [sum(right[: k + 1]) / (k + 1) for k in range(len(right)) if right[k]]
            aps.append(np.mean(precision))
            at_r.append(
                sum(p for p, k in zip(precision, np.flatnonzero(right), strict=True) if k < sum(right)) / sum(right)
            )
    score = score_labelled(some, labels)
    assert score["mAP"] == pytest.approx(100 * np.mean(aps)) and score["mAP@R"] == pytest.approx(100 * np.mean(at_r))


def test_queries_of_another_set():
    """q/a at 4: a/1 b/1 a/2 ...; q/b at 84: c/1 b/2 ...; q/c at 20: c/1 last; nothing is d."""
    asked = features(["q/a", "q/b", "q/c", "q/d"], angles(4, 84, 20, 0))
    labels = {"q/a": "a", "q/b": "b", "q/c": "c", "q/d": "d"}
    score = score_labelled(SET, labels_of_folders(NAMES), asked=(asked, labels), kappas=(1, 2))
    assert (score["queries"], score["alone"], score["images"], score["labels"]) == (3, 1, 5, 3)
    scores = asked.vectors.astype(np.float64) @ SET.vectors.astype(np.float64).T
    aps = []
    for row, label in zip(scores, "abc", strict=False):
        right = [NAMES[i][0] == label for i in np.argsort(-row, kind="stable")]
        aps.append(np.mean([sum(right[: k + 1]) / (k + 1) for k in range(5) if right[k]]))
    assert score["mAP"] == pytest.approx(100 * np.mean(aps))
    assert score["recall@1"] == pytest.approx(100 / 3) and score["recall@2"] == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="no query has a label that another image has"):
        score_labelled(SET, labels_of_folders(NAMES), asked=(asked, dict.fromkeys(asked.names, "z")))
    with pytest.raises(ValueError, match="no label of q/b, q/c, q/d, of 4 images"):
        score_labelled(SET, labels_of_folders(NAMES), asked=(asked, {"q/a": "a"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: the columns are"),
        (b"path,label\n", "no images in it"),
        (b"path,label\na,1\nb,2\na,3\n", "line 4: a is listed for '1' and '3'"),
        (b"path,label\na,\n", "line 2: the label is empty"),
        (b"path,label\n\xff,1\n", "line 2: the path"),
    ],
)
def test_label_files_that_cannot_be_used(tmp_path, content, message):
    """More of them in test_gldv2.py: the reader is that of list files."""
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_labels(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_label_files(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(b'\xef\xbb\xbfid,path,label\r\n0,"a, b",x y\r\n1,c,z\r\n')
    assert read_labels(path) == {"a, b": "x y", "c": "z"}
    with pytest.raises(ValueError, match="absent.csv: no such table"):
        read_labels(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="a, b lies in no folder"):
        labels_of_folders(["a", "b", "c/d"])


def test_labels_of_a_list_of_training(tmp_path):
    (tmp_path / "val_list.txt").write_text("a/x 1.jpg 3\n/far/y.jpg 12\n")
    assert read_labels(tmp_path / "val_list.txt") == {"a/x 1.jpg": "3", "far/y.jpg": "12"}


def test_sets_that_cannot_be_scored():
    with pytest.raises(ValueError, match="no label of b/1, b/2, c/1, of 5 images"):
        score_labelled(SET, {"a/1": "a", "a/2": "a"})
    with pytest.raises(ValueError, match="no label has two images"):
        score_labelled(SET, {name: name for name in NAMES})


def test_the_command(tmp_path, capsys):
    save(tmp_path / "photos", "images", SET)
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{name},{name[0]}\n" for name in [*NAMES, "gone"]))
    command = [sys.executable, str(ROOT / "evaler" / "evaluate_labels.py"), "photos", "--json", "score.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=child_environment(), timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "recall@5    100.00" in done.stdout
    assert "4 queries; 1 images are alone" in done.stdout
    main([str(tmp_path / "photos"), "--labels", str(tmp_path / "l.csv")])
    out, err = capsys.readouterr()
    assert out.splitlines()[2:] == done.stdout.splitlines()[2:]
    assert err.endswith("l.csv has labels of 1 images that are not in the set, of 6: gone\n")
    assert json.loads((tmp_path / "score.json").read_text())["provenance"] == {"weights_sha256": "a"}


def test_the_command_with_queries_apart(tmp_path, capsys):
    save(tmp_path / "photos", "images", SET)
    save(tmp_path / "queries", "images", features(["a/x", "b/y", "z/z"], angles(2, 49, 3)))
    main([str(tmp_path / "photos"), "--queries", str(tmp_path / "queries")])
    out, err = capsys.readouterr()
    assert "2 queries of " in out and "1 have a label that no image has" in out and not err
    assert "recall@1    100.00" in out
    other = features(["a/x"], [[1, 0, 0]])
    save(tmp_path / "other", "images", other)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "photos"), "--queries", str(tmp_path / "other")])
    assert "differ in dimension (2 and 3)" in capsys.readouterr().err


def test_a_query_that_is_an_image_too_does_not_find_itself(tmp_path, capsys):
    """b/2 at 50 asks for b/1 at 10: a/2 c b/1 (place 3), not itself at place 1. Under another folder it is the same;
    of another size or descriptor it is another photograph."""
    asked = features(["other/2", "b/2"], angles(50, 52))
    labels = {"other/2": "b", "b/2": "b"}
    score = score_labelled(SET, labels_of_folders(NAMES), asked=(asked, labels), kappas=(1, 2, 3))
    assert score["own"] == 1
    assert (score["recall@1"], score["recall@2"], score["recall@3"]) == (50, 50, 100)
    score = score_labelled(SET, labels_of_folders(NAMES), asked=(SET, labels_of_folders(NAMES)))
    alone = score_labelled(SET, labels_of_folders(NAMES))
    assert score["own"] == 5 and {key: score[key] for key in ("recall@1", "mAP", "mAP@R", "queries", "alone")} == {
        key: alone[key] for key in ("recall@1", "mAP", "mAP@R", "queries", "alone")
    }
    # Of another label it is no wrong image for itself either.
    mine = features(["b/2"], angles(50))
    other = score_labelled(SET, labels_of_folders(NAMES), asked=(mine, {"b/2": "a"}), kappas=(1, 2))
    assert other["recall@1"] == 100  # a/2 at 30
    save(tmp_path / "photos", "images", SET)
    save(tmp_path / "queries", "images", features(["b/2", "b/copy", "a/x"], angles(50, 10, 3)))
    main([str(tmp_path / "photos"), "--queries", str(tmp_path / "queries")])
    own, copy = capsys.readouterr().err.splitlines()
    assert own == "note: 1 queries are images of the set too and do not find themselves: b/2"
    assert copy.startswith("note: 1 queries have the descriptor of an image of another name") and "b/copy" in copy
