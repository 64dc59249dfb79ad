"""The benchmark of extraction: what its two sides compute, and that it does not pass over a difference."""

import json

import numpy as np
import pytest
import torch

from evaler.extraction.multiscale import describe
from model.dolg import DOLG
from model.resnet import ResNet
from scripts.benchmarks import extraction as benchmark_extraction
from scripts.benchmarks.command import main
from scripts.benchmarks.extraction import describe_as_published, distance, extract_cases
from tests.small_run import photograph

SCALES = (0.3535, 0.5, 0.7071, 1.0, 1.4142)


@pytest.fixture
def small(monkeypatch):
    """A small network in place of the R50."""
    network = lambda depth, photograph: DOLG(ResNet(18), dim=16).eval()  # noqa: E731
    monkeypatch.setattr(benchmark_extraction, "_network", network)


def test_the_baseline_is_the_published_descriptor():
    """`describe` is held to the goldens by test_goldens.py."""
    torch.manual_seed(0)
    network, image = DOLG(ResNet(18), dim=16).eval(), photograph(0, 75, 107)
    found = describe_as_published(network, image, SCALES, torch.device("cpu"))
    assert found.shape == (16,) and distance(found, describe(network, image, scales=SCALES).numpy()) < 1e-12


def test_the_distance_has_known_values():
    assert distance(np.float32([1, 0]), np.float32([5, 0])) == 0
    assert distance(np.float32([1, 0]), np.float32([0, 3])) == pytest.approx(1)
    assert distance(np.float32([1, 0]), np.float32([-2, 0])) == pytest.approx(2)
    assert distance(np.array([1, 0]), np.array([1, 1e-6])) == pytest.approx(5e-13, rel=1e-6)  # where 1 - 1 would be 0


def test_both_sides_describe_the_photograph_alike(small):
    (case,) = extract_cases("fp32", depth=18, size=(60, 80), seconds=0.0)
    assert case.ratio > 0 and len(case.ours) >= 3
    assert "80 x 60" in case.case and "images/s" in case.note
    assert float(case.note.rsplit(" ", 1)[1]) < 1e-10


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_a_difference_ends_it(small, monkeypatch, mode):
    right = benchmark_extraction.describe_batch
    two = lambda network, images, scales: right(network, images, scales=scales[:2])  # noqa: E731
    monkeypatch.setattr(benchmark_extraction, "describe_batch", two)
    with pytest.raises(AssertionError, match=f"1 - cosine of .* in {mode}"):
        list(extract_cases(mode, depth=18, size=(60, 80), seconds=0.0))


def test_a_random_network_has_maps_of_ordinary_size():
    network = benchmark_extraction._network(18, photograph(0, 96, 128))
    assert not network.training
    with torch.no_grad():
        f3, f4 = network.globalmodel(torch.randn(1, 3, 96, 128))
    assert 0.1 < f3.std() < 10 and 0.1 < f4.std() < 10


def test_the_command(small, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["extract", "--mode", "exact"])
    assert "extract has no --mode exact, but fp32, bf16, fp16" in capsys.readouterr().err
    main(["extract", "--mode", "bf16", "--size", "64", "--seconds", "0", "--json", str(tmp_path / "out.json")])
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["name"], record["mode"]) == ("extract", "bf16") and record["ratio"] > 0
    printed = capsys.readouterr().out
    assert "extract (bf16)" in printed and "1 - cosine between both" in printed
