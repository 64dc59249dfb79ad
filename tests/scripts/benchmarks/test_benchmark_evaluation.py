"""The benchmark of scoring: what its two sides compute, and that it does not pass over a difference."""

import functools
import json
import pickle

import numpy as np
import pytest

from revisitop.protocol import evaluate
from scripts.benchmarks import evaluation as benchmark_evaluation
from scripts.benchmarks.command import main
from scripts.benchmarks.evaluation import Stream, evaluate_as_published, evaluate_cases, stream_cases


def test_the_baseline_scores_as_ours():
    labels = benchmark_evaluation._labels(400, queries=5)
    queries, database = benchmark_evaluation._descriptors(labels, 400, 3000, 16)
    ours, published = evaluate(queries, database, labels), evaluate_as_published(queries, database, labels)
    assert 0.05 < ours["M"]["mAP"] < 0.99
    for setting in "EMH":
        np.testing.assert_allclose(ours[setting]["aps"], published[setting]["aps"], atol=1e-9)
        assert ours[setting]["mP@k"] == pytest.approx(published[setting]["mP@k"])


def test_a_difference_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(benchmark_evaluation, "evaluate_as_published", lambda q, d, labels: evaluate(-q, d, labels))
    with pytest.raises(AssertionError):
        list(evaluate_cases(images=400, distractors=600, dim=16, runs=1))


def test_the_stream_is_the_same_however_it_is_read():
    stream = Stream(40_000, 8)
    whole = np.concatenate([stream[i : i + 16384] for i in range(0, 40_000, 16384)])
    assert whole.shape == (40_000, 8) and len(np.unique(whole, axis=0)) == 40_000
    for row in (0, 16383, 16384, 39_999):
        np.testing.assert_array_equal(stream[row : row + 1], whole[row : row + 1])
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


def test_a_stream_is_scored_and_its_length_told():
    (case,) = stream_cases(count=50_000, dim=8)
    assert case.case.startswith("70 x 50,000 x 8") and "MiB" in case.note


def test_the_command(tmp_path, monkeypatch, capsys):
    labels = [{"bbx": None, "easy": [1, 2], "hard": [3], "junk": [4]}]
    truth = {"imlist": [f"i{i}" for i in range(9)], "qimlist": ["q"], "gnd": labels}
    (tmp_path / "gnd_x.pkl").write_bytes(pickle.dumps(truth))
    small = functools.partial(evaluate_cases, distractors=100, dim=16, runs=1)
    monkeypatch.setattr("scripts.benchmarks.command.evaluate_cases", small)
    main(["evaluate", "--truth", str(tmp_path / "gnd_x.pkl"), "--json", str(tmp_path / "out.json")])
    assert "1 x 109 x 16" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["mode"] == "1m"
