"""The drift report: distances, scores and rates of every way to describe, in one table."""

import json

import pytest
import torch

from core import builders
from core.config import load_cfg
from scripts.benchmarks import command as benchmark
from tests.small_run import SMALL_MODEL, overrides, retrieval_set


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    retrieval_set(folder / "data")
    (folder / "some.yaml").touch()
    torch.manual_seed(4)
    network = builders.build_descriptor(load_cfg(None, overrides(SMALL_MODEL)))
    torch.save(network.state_dict(), folder / "weights.pyth")
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def run(*more):
        keys = {"NUM_GPUS": 0, "INFER.DATA_DIR": "data", "INFER.DATASETS": "toy", "TEST.WEIGHTS": "weights.pyth"}
        settings = overrides(SMALL_MODEL, keys)
        benchmark.main(["drift", "--cfg", "some.yaml", *settings, "--json", "drift.json", *more])
        rows = {row["variant"]: row for row in json.loads((place / "drift.json").read_text())["rows"]}
        return capsys.readouterr().out, rows

    return run


def test_a_whole_set_with_its_scores(run):
    out, rows = run()
    plain = rows["plain network"]
    assert plain["largest"] == plain["mean"] == 0 and len(plain["scores"]) == 3
    for name in ("fp32", "fp32, batches of 8"):
        assert rows[name]["largest"] < 1e-6 and rows[name]["scores"] == pytest.approx(plain["scores"])
    assert 0 < rows["fp32, float16 on disk"]["largest"] < 1e-6
    assert 1e-8 < rows["bf16"]["largest"] < 1e-2
    assert rows["resized as uint8"]["largest"] > 1e-8
    assert rows["resized with antialiasing"]["mean"] > rows["resized as uint8"]["mean"]
    assert rows["single scale"]["mean"] > rows["bf16"]["mean"]
    for name, row in rows.items():
        assert row["images_per_second"] > 0 and 0 <= row["mean"] <= row["largest"]
        assert name in out
    assert "mAP" in out.splitlines()[0]


def test_a_few_images_have_no_scores(run):
    out, rows = run("--images", "2")
    assert all(row["scores"] == [] for row in rows.values()) and " - " in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["drift"], "drift needs --cfg FILE"), (["head", "A", "B"], "head takes no settings: A B")],
)
def test_mistakes(capsys, arguments, said):
    with pytest.raises(SystemExit) as raised:
        benchmark.main(arguments)
    assert raised.value.code == 2 and said in capsys.readouterr().err
