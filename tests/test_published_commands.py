"""The three command lines of the published README, on the CPU: its recipe, with small sizes as overrides."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core import builders
from core.config import load_cfg
from core.logging import read_stats
from evaler.features import store as features
from tests.small_run import ROOT, child_environment, landmarks, messages, overrides, python, retrieval_set

CFG = "configs/resnet50_delg_8gpu.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, as if it were a checkout: with configs/ and scripts/, data, and ImageNet weights."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("configs", "scripts", "evaler", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    landmarks(folder / "datasets" / "data", name="landmark", train=4, val=3)
    retrieval_set(folder / "datasets" / "data", "roxford5k", queries=2, database=3)
    torch.manual_seed(7)
    backbone = builders.build_descriptor(load_cfg(ROOT / CFG)).globalmodel.state_dict()
    head = {"head.fc.weight": torch.randn(1000, 2048), "head.fc.bias": torch.randn(1000)}
    (folder / "pretrained").mkdir()
    content = {"epoch": 99, "model_state": backbone | head, "test_err": 23.2, "cfg": "MODEL: {TYPE: resnet}\n"}
    torch.save(content, folder / "pretrained" / "R-50-1x64d_dds_8gpu.pyth")
    yield folder
    shutil.rmtree(folder)  # some hundred MB


SMALL = {
    "NUM_GPUS": 0,
    "MODEL.NUM_CLASSES": 3,
    "TRAIN.IM_SIZE": 64,
    "TEST.IM_SIZE": 64,
    "TRAIN.BATCH_SIZE": 2,
    "TEST.BATCH_SIZE": 2,
    "DATA_LOADER.NUM_WORKERS": 1,
    "OPTIM.MAX_EPOCH": 1,
    "INFER.DATASETS": "roxford5k",
    "INFER.SCALES": "[0.7071, 1.0]",
}


@pytest.fixture(scope="module")
def trained(place):
    weights = {"TRAIN.WEIGHTS": "pretrained/R-50-1x64d_dds_8gpu.pyth"}
    ended = python("train.py", "--cfg", CFG, *overrides(SMALL, weights), cwd=place)
    assert ended.returncode == 0 and messages(ended.stderr) == [], ended.stderr
    return ended


def test_train(trained, place):
    out = trained.stdout
    notes = [line for line in out.splitlines() if "R-50-1x64d_dds_8gpu.pyth: " in line]
    assert len(notes) == 2
    assert "left at their initial values" in notes[0] and "localmodel" in notes[0] and "pool_g" in notes[0]
    assert "left aside: head.fc.bias, head.fc.weight (2 tensors)" in notes[1]
    records = read_stats((place / "output" / "stdout.log").read_text().splitlines())
    kinds = [record["_type"] for record in records]
    assert kinds == ["train_iter", "train_epoch", "test_epoch"] and records[-1]["images"] == 3
    checkpoint = torch.load(place / "output" / "checkpoints" / "model_epoch_0001.pyth", weights_only=True)
    assert checkpoint["epoch"] == 0 and checkpoint["model_state"]["desc_cls.t"].item() != 0  # the release's head
    weights = torch.load(place / "pretrained" / "R-50-1x64d_dds_8gpu.pyth", weights_only=True)["model_state"]
    moved = checkpoint["model_state"]["globalmodel.stem.conv.weight"] - weights["stem.conv.weight"]
    assert 0 < moved.abs().max() < 0.1  # it began there
    assert (place / "output" / "config.yaml").is_file()


@pytest.fixture(scope="module")
def extracted(trained, place):
    ended = python("evaler/infer.py", "--cfg", CFG, *overrides(SMALL), cwd=place)
    assert ended.returncode == 0 and messages(ended.stderr) == [], ended.stderr
    return ended


def test_infer(extracted, place):
    assert "weights: output/checkpoints/model_epoch_0001.pyth, on the CPU" in extracted.stdout
    found = features.load(place / "output" / "features" / "roxford5k", "database")
    assert found.names == ["image0", "image1", "image2"] and found.vectors.shape == (3, 512)


def test_the_extractor_script_with_two_shards_gives_the_same(extracted, place):
    env = child_environment() | {"SHARDS": "2", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    weights = {"TEST.WEIGHTS": "output/checkpoints/model_epoch_0001.pyth", "OUT_DIR": "sharded"}
    command = ["sh", "scripts/run_extractor.sh", CFG, *overrides(SMALL, weights)]
    ended = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    for collection in ("queries", "database"):
        whole = features.load(place / "output" / "features" / "roxford5k", collection)
        shards = features.load(place / "sharded" / "features" / "roxford5k", collection)
        rows = [shards.names.index(name) for name in whole.names]
        assert len(rows) == len(shards.names) and shards.vectors[rows].tobytes() == whole.vectors.tobytes()

    ended = python("evaler/evaluate.py", "--cfg", CFG, *overrides(SMALL, weights), cwd=place)
    assert ended.returncode == 0, ended.stderr
    score = json.loads(Path(place / "sharded" / "scores" / "roxford5k.json").read_text())
    assert 0 <= score["M"]["mAP"] <= 100 and score["queries"] == 2 and "Medium" in ended.stdout
