"""Comparing scores: known differences, an interval against theory, and files that are no scores."""

import copy
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from evaler.scoring.comparison import compare, compare_queries, main, table
from evaler.scoring.score import Score, read
from tests.small_run import ROOT

CARD = {"set": "toy", "gallery": 9, "distractors": 0, "ground_truth_sha256": "a", "scales": [1.0], "weights": "x"}


def score(easy, medium, hard, **card):
    names = [f"q{i}" for i in range(len(easy))]
    settings = {key: {"aps": list(aps)} for key, aps in zip("EMH", (easy, medium, hard), strict=True)}
    return {"query_names": names, "card": CARD | card, **settings}


def of(record):
    return Score.from_json(record, "here")


A = score([50.0, None, 20.0], [10.0, 20.0, 30.0], [None] * 3)
B = score([60.0, None, 20.0], [10.0, 50.0, 25.0], [None] * 3, scales=[0.5, 1.0], weights="y")


def test_by_hand():
    result = compare(of(A), of(B))
    easy, medium = result["E"]["difference"], result["M"]["difference"]
    assert (easy["a"], easy["b"], easy["better"], easy["worse"], easy["queries"]) == (35, 40, 1, 0, 2)
    assert (medium["a"], medium["better"], medium["worse"], medium["queries"]) == (20, 1, 1, 3)
    assert medium["b"] == pytest.approx(85 / 3)
    assert result["M"]["queries"] == [("q1", 20.0, 50.0), ("q2", 30.0, 25.0), ("q0", 10.0, 10.0)]
    assert "H" not in result and result["card"] == {"scales": [[1.0], [0.5, 1.0]]}
    text = table(result, of(A), most=1)
    assert "Medium     20.00   28.33    +8.33" in text and "q1" in text and "q2" not in text
    assert "no query has positives" in text and "holds 0" in text and "differs: scales" in text


def test_the_interval_is_that_of_the_mean():
    """For many queries the bootstrap's interval is the normal one: mean +- 1.96 standard errors."""
    rng = np.random.default_rng(3)
    a, change = rng.uniform(20, 80, 400), rng.normal(1, 5, 400)
    found = compare_queries(a, a + change)
    error = change.std() / 20
    assert found.mean == pytest.approx(change.mean())
    assert found.low == pytest.approx(change.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(change.mean() + 1.96 * error, abs=0.1 * error)


def test_pairs_are_kept_together():
    """The same change of every query is certain, however different the queries are."""
    a = np.arange(0, 70.0)
    found = compare_queries(a, a + 2)
    assert (found.low, found.high, found.better) == (pytest.approx(2), pytest.approx(2), 70)
    same = compare_queries(a, a)
    assert (same.low, same.high, same.better, same.worse) == (0, 0, 0, 0)


@pytest.mark.parametrize("key", ["set", "gallery", "distractors", "ground_truth_sha256"])
def test_scores_that_cannot_be_compared(key):
    other = copy.deepcopy(A)
    other["card"][key] = "other"
    with pytest.raises(ValueError, match=f"cannot be compared: {key} is"):
        compare(of(A), of(other))


def test_other_queries():
    with pytest.raises(ValueError, match="their queries are others"):
        compare(of(A), of(A | {"query_names": ["q0", "q1", "other"]}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 100_000,
        json.dumps({**A, "card": {}}).encode(),
        json.dumps({**A, "query_names": "q0"}).encode(),
        json.dumps({**A, "M": {"aps": [1, 2]}}).encode(),
        json.dumps({**A, "M": {"aps": [1, 2, "3"]}}).encode(),
        json.dumps({**A, "M": {"aps": [1, 2, float("nan")]}}).encode(),
        json.dumps({**A, "H": None}).encode(),
        json.dumps(
            {**A, "settings": {"card": "c"}, "card": {**A["card"], "aps": [1] * len(A["query_names"])}}
        ).encode(),
    ],
)
def test_files_that_are_no_scores(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.json: not ") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_the_command(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (A, B), strict=True):
        path.write_text(json.dumps(content))
    command = [sys.executable, str(ROOT / "evaler" / "compare.py"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "+8.33" in done.stdout
    main([*map(str, paths), "--json", str(tmp_path / "c.json"), "--queries", "0"])
    assert "changed most" not in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["M"]["difference"]["worse"] == 1
    with pytest.raises(SystemExit) as caught:
        main([str(paths[0]), str(tmp_path / "absent.json")])
    assert caught.value.code == 2
    assert "absent.json: no such file; evaler/evaluate.py writes" in capsys.readouterr().err


def test_a_set_of_many_queries_takes_little_memory():
    """A labelled set has as many queries as images."""
    a, b = np.zeros(20_000), np.random.default_rng(0).uniform(0, 100, 20_000)
    tracemalloc.start()
    difference = compare_queries(a, b, samples=500)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    deviation = b.std() / len(b) ** 0.5  # of the mean, by the central limit theorem
    np.testing.assert_allclose(difference.high - difference.low, 2 * 1.96 * deviation, rtol=0.15)
