"""Google Landmarks v2 by hand: retrieval, recognition, their files and the command."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from evaler.features.store import FeaturesError, Rejected, save
from evaler.scoring.gldv2 import main, mean, read_solution, read_train_labels, recognition, retrieval, vote
from tests.evaler.scoring.test_labels import angles, features
from tests.small_run import ROOT, child_environment

QUERIES = features(["a/a/a/aaa1.jpg", "b/b/b/bbb1.jpg", "c/c/c/ccc1.jpg", "d/d/d/ddd1.jpg"], angles(0, 40, 80, 85))
INDEX = features([f"0/0/0/{i:016d}.jpg" for i in range(4)], angles(5, 30, 45, 88))
X = [f"{i:016d}" for i in range(4)]  # ids of the index images
RETRIEVAL = f"""id,images,Usage
aaa1,{X[0]} {X[2]},Public
bbb1,{X[1]},Private
ccc1,None,Ignored
ddd1,{X[3]} gone,Private
"""
RECOGNITION = "id,landmarks,Usage\naaa1,7,Public\nbbb1,8 9,Public\nccc1,,Public\nddd1,,Private\n"
LABELS = dict(zip(X, "7791", strict=True))


def solution(tmp_path, text, column):
    (tmp_path / "s.csv").write_text(text)
    return read_solution(tmp_path / "s.csv", column)


def test_retrieval(tmp_path):
    """aaa1 at 0: X[0] 1 2 3; bbb1 at 40: X[2] X[1]; ddd1 at 85: X[3], and one that is not in the index."""
    found = solution(tmp_path, RETRIEVAL, "images")
    assert found["Private"].keys() == {"bbb1", "ddd1"}
    scores = retrieval(QUERIES, INDEX, found)
    assert mean(scores["Public"]) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert mean(scores["Private"]) == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)


def test_recognition(tmp_path):
    """By the nearest image: aaa1 is 7 (cos 5), bbb1 is 9 (cos 5), ccc1 has no landmark and is 1 (cos 8)."""
    found = solution(tmp_path, RECOGNITION, "landmarks")
    assert recognition(QUERIES, INDEX, LABELS, found, voting=1) == {"Public": {"aaa1": 1, "bbb1": 1}}
    # By all: 7 has two votes and is what all three are taken for, bbb1 the surest (cos 35 + cos 10).
    scores = recognition(QUERIES, INDEX, LABELS, found, voting=4)
    sums = [np.cos(np.radians(q - 5)) + np.cos(np.radians(q - 30)) for q in (0, 40)]
    assert mean(scores["Public"]) == pytest.approx(100 * (1 if sums[0] > sums[1] else 1 / 2) / 2)
    with pytest.raises(ValueError, match=f"no landmark of {X[3]}, of 4 training images"):
        recognition(QUERIES, INDEX, {key: value for key, value in LABELS.items() if key != X[3]}, found)


def test_votes():
    assert vote(["a", "b", "b"], [0.9, 0.5, 0.5]) == ("b", 1.0)
    assert vote(["a", "b", "b"], [0.9, 0.4, 0.4]) == ("a", 0.9)
    assert vote(["a", "b"], [0.5, 0.5]) == ("a", 0.5)


def test_a_query_without_descriptor(tmp_path):
    found = solution(tmp_path, RETRIEVAL + f"eee1,{X[0]},Public\n", "images")
    with pytest.raises(FeaturesError, match="no descriptor of 1 queries of the solution: eee1"):
        retrieval(QUERIES, INDEX, found)


def test_a_rejected_query_is_not_found(tmp_path, capsys):
    """Half of the private queries is lost: 1/4 of the one that is left, over two. GAP: one right of two."""
    lost = [Rejected(1, "b/b/b/bbb1.jpg", "truncated"), Rejected(4, "e/e/e/eee1.jpg", "truncated")]
    some = features(["a/a/a/aaa1.jpg", "c/c/c/ccc1.jpg", "d/d/d/ddd1.jpg"], angles(0, 80, 85))
    some = replace(some, rejected=lost)
    scores = retrieval(some, INDEX, solution(tmp_path, RETRIEVAL, "images"))
    assert mean(scores["Private"]) == pytest.approx(100 * (1 / 2) / 2)
    found = solution(tmp_path, "id,landmarks,Usage\naaa1,7,Public\nbbb1,9,Public\neee1,,Public\n", "landmarks")
    assert recognition(some, INDEX, LABELS, found, voting=1) == {"Public": {"aaa1": 1, "bbb1": 0}}
    save(tmp_path / "test", "images", some)
    save(tmp_path / "index", "images", INDEX)
    (tmp_path / "r.csv").write_text(RETRIEVAL)
    places = [str(tmp_path / name) for name in ("r.csv", "test", "index")]
    main(["retrieval", *places, "--json", str(tmp_path / "o.json")])
    assert "25.00   (2 queries, 1 of them rejected: nothing found, 4 images)" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["rejected"] == {"Public": 0, "Private": 1}
    with pytest.raises(FeaturesError, match="no descriptor of 1 queries of the solution: fff1"):
        retrieval(some, INDEX, solution(tmp_path, RETRIEVAL + f"fff1,{X[0]},Public\n", "images"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,Usage\na,Public\n", "line 1: the columns are .id,Usage.; expected id,images,Usage"),
        ("id,images,Usage\na,x,Public\na,y,Private\n", "line 3: the query 'a' is empty or there twice"),
        ("id,images,Usage\n,x,Public\n", "line 2: the query '' is empty"),
        ("id,images,Usage\na,x,public\n", "line 2: Usage 'public' is not"),
        ("id,images,Usage\na,,Public\n", "line 2: 'a' has no images"),
        ("id,images,Usage\na,x,Ignored\n", "no query that counts"),
    ],
)
def test_solutions_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        solution(tmp_path, text, "images")


def test_training_labels(tmp_path):
    """Both files of the data set; landmark 007 is 7, as in the solution."""
    a, b, c = (f"{i:016d}" for i in range(3))
    (tmp_path / "clean.csv").write_text(f"landmark_id,images\n7,{a} {b}\n008,{c}\n")
    (tmp_path / "train.csv").write_text(f"id,url,landmark_id\n{a},http,7\n{b},http,7\n{c},http,8\n")
    for name in ("clean.csv", "train.csv"):
        assert read_train_labels(tmp_path / name) == {a: "7", b: "7", c: "8"}
    found = solution(tmp_path, "id,landmarks,Usage\nq,007 12,Public\n", "landmarks")
    assert found["Public"] == {"q": {"7", "12"}}
    with pytest.raises(ValueError, match="line 2: 'x' is not a landmark id"):
        solution(tmp_path, "id,landmarks,Usage\nq,x,Public\n", "landmarks")


def test_a_landmark_with_very_many_images(tmp_path):
    """More than the 128 KiB that Python's csv reads by default."""
    many = " ".join(f"{i:016d}" for i in range(9000))
    found = solution(tmp_path, f"id,images,Usage\nq,{many},Public\n", "images")
    assert len(found["Public"]["q"]) == 9000


def test_two_images_of_one_id(tmp_path):
    twins = features(["x/aaa1.jpg", "y/aaa1.jpg"], angles(0, 1))
    with pytest.raises(FeaturesError, match="x/aaa1.jpg and y/aaa1.jpg have one id, which"):
        retrieval(twins, INDEX, solution(tmp_path, RETRIEVAL, "images"))
    with pytest.raises(FeaturesError, match="have one id"):
        retrieval(QUERIES, twins, solution(tmp_path, RETRIEVAL, "images"))
    with pytest.raises(FeaturesError, match="have one id"):
        recognition(QUERIES, twins, {"aaa1": "7"}, solution(tmp_path, RECOGNITION, "landmarks"))


def test_recognition_without_training_images(tmp_path):
    nothing = features([], np.empty((0, 2)))
    with pytest.raises(ValueError, match="no training images"):
        recognition(QUERIES, nothing, {}, solution(tmp_path, RECOGNITION, "landmarks"))


def test_the_command(tmp_path, capsys):
    save(tmp_path / "test", "images", QUERIES)
    save(tmp_path / "index", "images", INDEX)
    (tmp_path / "r.csv").write_text(RETRIEVAL)
    (tmp_path / "g.csv").write_text(RECOGNITION)
    (tmp_path / "l.csv").write_text(f"landmark_id,images\n7,{X[0]} {X[1]}\n9,{X[2]}\n1,{X[3]}\n")
    command = [sys.executable, str(ROOT / "evaler" / "evaluate_gldv2.py"), "retrieval", "r.csv", "test", "index"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=child_environment(), timeout=60)
    # A part of the index set scores low, and nothing else would show why.
    absent = "note: 1 of the 5 images that are right for a query are not in index and cannot be found: gone\n"
    assert (done.returncode, done.stderr) == (0, absent)
    assert "mAP@100 Public     83.33   (1 queries, 4 images)" in done.stdout
    places = [str(tmp_path / name) for name in ("g.csv", "test", "index")]
    main(
        [
            "recognition",
            *places,
            "--labels",
            str(tmp_path / "l.csv"),
            "--voting",
            "1",
            "--json",
            str(tmp_path / "o.json"),
        ]
    )
    assert "GAP Public    100.00" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["scores"] == {"Public": pytest.approx(100)}
    with pytest.raises(SystemExit):
        main(["recognition", *places])
    assert "recognition needs --labels" in capsys.readouterr().err
