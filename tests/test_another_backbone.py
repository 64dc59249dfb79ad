"""What a backbone costs: a class and a row of the table. It trains, resumes, describes, and is recognised."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.builders import build_descriptor
from core.checkpoints.checkpoint import checkpoints
from core.config import ConfigError, load_cfg
from core.trainer import train
from evaler.describer import load
from evaler.extraction import command as extract
from evaler.features import store as features
from model.backbones import BACKBONES, Backbone, Size
from model.weights.loading import WeightsError
from tests.small_run import SMALL_TRAINING, landmarks, overrides

# ------------------------------------------------------------------------------------------------------ its file


class PlainNet(nn.Module):
    """Pairs of convolutions with stride 4 in four stages, f3 and f4 like any other's."""

    widths = (6, 8, 12, 16)

    def __init__(self, depth: int, *, bn_eps: float):
        super().__init__()
        strides, before = (4, 2, 2, 2), 3
        for index, (width, stride) in enumerate(zip(self.widths, strides, strict=True)):
            stage = nn.Sequential(nn.Conv2d(before, width, 3, stride=stride, padding=1))
            for _ in range(depth - 1):
                stage += nn.Sequential(nn.BatchNorm2d(width, eps=bn_eps), nn.ReLU(), nn.Conv2d(width, width, 1))
            self.add_module(f"part{index}", stage)
            before = width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        f3 = self.part2(self.part1(self.part0(images)))
        return f3, self.part3(f3)

    @staticmethod
    def recognise(state) -> dict[str, object]:
        layers = {key for key in state if re.fullmatch(r"part0\.\d+\.weight", key) and state[key].dim() == 4}
        return {"MODEL.DEPTH": len(layers)} if layers else {}


# ------------------------------------------------------------------------------------------------------- its row

ROW = Backbone(
    title="PlainNet",
    layers=lambda: PlainNet,
    settings={"depth": "MODEL.DEPTH", "bn_eps": "BN.EPS"},
    stages=("part0", "part1", "part2", "part3"),
    sizes={depth: Size(12, 16) for depth in (2, 3)},
)


# ------------------------------------------------------------------------------------------------------ its uses


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(BACKBONES, "plain", ROW)


@pytest.fixture
def settings(tmp_path):
    data_dir = landmarks(tmp_path / "data", train=4, val=3)
    plain = {"MODEL.TYPE": "plain", "MODEL.DEPTH": 2, "MODEL.HEADS.REDUCTION_DIM": 8, "MODEL.NUM_CLASSES": 3}
    return SMALL_TRAINING | plain | {"DATA_LOADER.DATA_DIR": data_dir, "OUT_DIR": tmp_path / "out"}


def run(settings: dict, **more) -> dict:
    cfg = load_cfg(None, overrides(settings, {key.replace("__", "."): value for key, value in more.items()}))
    train(cfg)
    return torch.load(checkpoints(cfg.OUT_DIR)[-1], weights_only=True)


@pytest.mark.parametrize("fusion", ["orthogonal", "global"])
def test_it_trains_resumes_and_describes(settings, fusion, tmp_path, capsys):
    settings |= {"MODEL.FUSION": fusion}
    whole = run(settings, OPTIM__MAX_EPOCH=2, OUT_DIR=tmp_path / "whole")["model_state"]
    assert "PlainNet-2, " in capsys.readouterr().out
    first = run(settings, OPTIM__MAX_EPOCH=1)["model_state"]
    resumed = run(settings, OPTIM__MAX_EPOCH=2)["model_state"]
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert not any(torch.equal(resumed[key], first[key]) for key in first if key.endswith("weight"))

    (tmp_path / "some.yaml").touch()
    photos = tmp_path / "data" / "tiny" / "val"
    extract.main(["--cfg", str(tmp_path / "some.yaml"), *overrides(settings, {"INFER.IMAGES": photos})])
    collection = features.load(tmp_path / "out" / "features" / "val", "images")
    described = collection.vectors
    assert (collection.provenance.backbone, collection.provenance.depth) == ("plain", 2)
    describe = load(checkpoints(tmp_path / "out")[-1])
    assert described.shape == (3, 8)
    np.testing.assert_array_equal(describe(sorted(photos.iterdir())), described)


def test_its_stages_are_frozen(settings):
    first = run(settings, OPTIM__MAX_EPOCH=0)["model_state"]
    settings["OUT_DIR"] = settings["OUT_DIR"] / "frozen"
    after = run(settings, OPTIM__MAX_EPOCH=1, TRAIN__FREEZE_AT=2)["model_state"]
    for key, value in first.items():
        if key.startswith("globalmodel.") and not key.endswith("bias"):  # batch norm takes away a bias before it
            assert torch.equal(value, after[key]) == (key.split(".")[1] in ROW.stages[:2]), key


def test_its_depths_stages_and_widths_are_checked(settings):
    for wrong, named in (
        ({"MODEL.DEPTH": 50}, "MODEL.DEPTH 50 is not one of: 2, 3"),
        ({"TRAIN.FREEZE_AT": 5}, "TRAIN.FREEZE_AT 5 is not one of: 0, 1, 2, 3, 4"),
        ({"MODEL.S3_DIM": 1024}, "MODEL.S3_DIM 1024 does not fit: a PlainNet of MODEL.DEPTH 2"),
    ):
        with pytest.raises(ConfigError, match=named):
            load_cfg(None, overrides(settings, wrong))


def test_weights_of_another_family_are_named(settings, tmp_path):
    network = build_descriptor(load_cfg(None, ["MODEL.DEPTH", "18", "MODEL.HEADS.REDUCTION_DIM", "8", "NUM_GPUS", "0"]))
    torch.save(network.state_dict(), tmp_path / "resnet.pyth")
    with pytest.raises(WeightsError, match=r"another architecture: MODEL.TYPE resnet \(here plain\), MODEL.DEPTH 18"):
        run(settings, TRAIN__WEIGHTS=tmp_path / "resnet.pyth")


def test_bare_backbones_load(settings, tmp_path):
    torch.save(PlainNet(2, bn_eps=1e-5).state_dict(), tmp_path / "backbone.pyth")
    run(settings, OPTIM__MAX_EPOCH=0, TRAIN__WEIGHTS=tmp_path / "backbone.pyth")
    torch.save(PlainNet(3, bn_eps=1e-5).state_dict(), tmp_path / "deeper.pyth")
    deeper = {"TRAIN__WEIGHTS": tmp_path / "deeper.pyth", "OUT_DIR": tmp_path / "other"}
    with pytest.raises(WeightsError, match=r"another architecture: MODEL.DEPTH 3 \(here 2\)"):
        run(settings, OPTIM__MAX_EPOCH=0, **deeper)
