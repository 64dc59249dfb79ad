"""The harness of the benchmarks, and that both sides of one compute the same."""

import json

import pytest
import torch
import torch.nn.functional as F

from core import benchmark, benchmark_training
from core.benchmark import Case, compare, report
from core.builders import build_descriptor
from core.config import load_cfg
from model.published import PublishedClassifier, PublishedHead
from tests.small_run import SMALL_MODEL, overrides, python


def test_both_sides_run_in_turn_and_medians_are_compared(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    costs = {"ours": iter([50, 1, 2, 9]), "baseline": iter([70, 6, 8, 7])}  # the first of each is not counted

    def side(name):
        def run():
            calls.append(name)
            now[0] += next(costs[name])

        return run

    case = compare("any", side("ours"), side("baseline"), seconds=0.0, least=3)
    assert calls == ["ours", "baseline"] * 4
    assert (case.ours, case.baseline, case.ratio, case.runs) == (2, 7, 3.5, 3)


def test_the_ratio_that_counts_is_the_smallest(tmp_path):
    cases = [Case("small", 1.0, 5.0, 3), Case("large", 2.0, 6.0, 4, "a note")]
    text = report("head", "", cases, path=tmp_path / "result.json")
    record = json.loads((tmp_path / "result.json").read_text())
    assert {"name", "mode", "ratio", "ours", "baseline", "machine", "versions"} <= record.keys()
    assert (record["ratio"], record["ours"], record["baseline"]) == (3.0, 2.0, 6.0)
    assert [case["ratio"] for case in record["cases"]] == [5.0, 3.0] and "a note" in text and "3.00x" in text


@pytest.mark.parametrize("with_ma", [False, True])
def test_the_published_network_gives_our_descriptors(with_ma):
    """Ours are held to the goldens by test_goldens.py: so is the baseline of the step."""
    torch.manual_seed(0)
    network = build_descriptor(load_cfg(None, overrides(SMALL_MODEL, {"MODEL.WITH_MA": with_ma}))).double().eval()
    images = torch.randn(3, 3, 64, 80, dtype=torch.float64)
    published = PublishedClassifier(network, PublishedHead(8, 5, scale=30.0, margin=0.15).double())
    with torch.no_grad():
        torch.testing.assert_close(published.describe(images), network(images), rtol=1e-10, atol=1e-12)


def test_both_steps_begin_with_the_same_loss(monkeypatch):
    monkeypatch.setattr(benchmark_training, "CLASSES", 50)
    losses = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.detach()))
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 44])
    device = torch.device("cpu")
    ours = benchmark_training._our_step(50, 2, images, labels, device, "fp32", False)
    published = benchmark_training._published_step(50, images, labels, device)
    for run in (ours, published):
        with pytest.raises((RuntimeError, IndexError)):  # there are no gradients to go on with
            run()
            raise RuntimeError
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert F.relu(losses[0]) > 0


def test_photographs_have_the_bytes_of_photographs(tmp_path):
    for path in benchmark_training.write_photographs(tmp_path, 3, side=400):
        assert path.stat().st_size / (400 * 300) == pytest.approx(benchmark_training.BYTES_PER_PIXEL, rel=0.05)


def test_the_command(tmp_path):
    arguments = ("loader", "--mode", "fast", "--size", "64", "--seconds", "0.1", "--json", tmp_path / "out.json")
    ended = python(benchmark.__file__.replace("core/benchmark.py", "scripts/benchmark.py"), *arguments, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["name"], record["mode"]) == ("loader", "fast") and record["ratio"] > 0
    assert "loader (fast)" in ended.stdout and "images/s with 2 workers" in ended.stdout
