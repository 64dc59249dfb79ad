"""The harness of the benchmarks, and that both sides of one compute the same."""

import json

import pytest
import torch
import torch.nn.functional as F

from core.builders import build_descriptor
from core.config import load_cfg
from scripts.benchmarks import calls as benchmark_calls
from scripts.benchmarks import timing as benchmark
from scripts.benchmarks import training as benchmark_training
from scripts.benchmarks.command import main
from scripts.benchmarks.published_layers import PublishedClassifier, PublishedHead
from scripts.benchmarks.timing import Case, compare, report
from tests.small_run import SMALL_MODEL, overrides


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
    assert (case.ours, case.baseline) == ([1, 2, 9], [6, 8, 7])
    assert case.ratio == 4 and case.ratios == pytest.approx([6, 4, 7 / 9])  # of pairs, not of medians: 3.5


def test_a_report_has_medians_ranges_and_the_load_from_before(tmp_path):
    cases = [Case("small", [1.0, 2.0, 1.0], [5.0, 8.0, 6.0]), Case("large", [2.0], [6.0], "a note")]
    before = benchmark.machine() | {"load": 7.25}
    text = report("head", "", cases, before=before, path=tmp_path / "result.json")
    record = json.loads((tmp_path / "result.json").read_text())
    assert {"name", "mode", "machine", "versions", "load_after"} <= record.keys()
    assert (record["ratio"], record["ours"], record["baseline"]) == (3.0, 2.0, 6.0)  # of the smallest ratio
    assert [case["ratio"] for case in record["cases"]] == [5.0, 3.0] and "a note" in text
    assert "5.00 (4.00..6.00)" in text and "6.000 (5.000..8.000)" in text and "load 7.25 before" in text
    assert "OMP_WAIT_POLICY " in text


def test_several_calls_become_a_row(monkeypatch, tmp_path):
    ratios = iter([3.0, 5.0, 4.0])

    def call(arguments):
        case = Case("x", [1.0], [next(ratios)] if arguments[0] == "head" else [1.0])
        return {"name": arguments[0], "mode": "", "ratio": 1.0, "cases": [case.record()], "load_after": 0.0} | common

    common = {"machine": benchmark.machine(), "versions": benchmark.versions()}
    monkeypatch.setattr(benchmark_calls, "_call", call)
    lines = benchmark_calls.all_tables(calls=3, path=tmp_path / "all.json").splitlines()
    assert "| head | x | 1.000 (1.000..1.000) | 4.000 (3.000..5.000) | 4.00 (3.00..5.00) | 3 x 1 |  |" in lines
    assert len(json.loads((tmp_path / "all.json").read_text())["calls"]) == 3 * len(benchmark_calls.TABLES) + 1


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


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_training, "LOADER_FILES", 8)
    monkeypatch.setattr(benchmark_training, "LOADER_IMAGES", 16)
    monkeypatch.setattr(benchmark_training, "LOADER_SIDE", 100)
    file = tmp_path / "out.json"
    command = ["loader", "--mode", "fast", "--size", "64", "--seconds", "0", "--pairs", "1", "--json", str(file)]
    main(command)
    record, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert (record["name"], record["mode"]) == ("loader", "fast") and record["ratio"] > 0
    assert "loader (fast)" in printed and "images/s with 2 workers" in printed


def test_a_step_is_timed_in_the_precision_that_was_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark_training, "_our_step", lambda *args: asked.append(args[5]) or (lambda: None))
    monkeypatch.setattr(benchmark_training, "_published_step", lambda *args: lambda: None)
    for precision in ("fp32", "bf16"):
        list(benchmark_training.step_cases(size=8, batch=1, precision=precision, seconds=0))
    assert asked == ["fp32", "bf16"]
