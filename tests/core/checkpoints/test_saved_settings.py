"""The configuration in a weight file: what its run used counts, what it never read does not."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

from core.builders import build_classifier, load_initial_weights
from core.checkpoints.saved_settings import check_saved_settings, network_settings
from core.config import get_cfg, load_cfg
from evaler.network import settings_of
from model import resnet

# As pycls saves it from configs/dds_baselines/resnet/R-50-1x64d_dds_8gpu.yaml: with its defaults for what is not set.
PYCLS = {
    "MODEL": {"TYPE": "anynet", "DEPTH": 0, "NUM_CLASSES": 1000, "ACTIVATION_FUN": "relu"},
    "ANYNET": {
        "STEM_TYPE": "res_stem_in",
        "STEM_W": 64,
        "BLOCK_TYPE": "res_bottleneck_block",
        "STRIDES": [1, 2, 2, 2],
        "DEPTHS": [3, 4, 6, 3],
        "WIDTHS": [256, 512, 1024, 2048],
        "BOT_MULS": [0.25, 0.25, 0.25, 0.25],
        "GROUP_WS": [64, 128, 256, 512],
        "HEAD_W": 0,
        "SE_ON": False,
        "SE_R": 0.25,
    },
    "RESNET": {"TRANS_FUN": "basic_transform", "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "STRIDE_1X1": True},
    "BN": {"EPS": 1e-05, "MOM": 0.1},
}
# What pycls' AnyNet gives at float64 for the network, weights and images of `test_features_are_those_of_pycls`.
F3 = (0.4058574573260452, 0.48111916523693865, 0.0, 0.0, 0.48111916523693865, 0.12026366468863703)
F4 = (6994.691754972171, 1048.9388954143305, 0.0, 9131.863844560467, 0.0, 523.0925932790462)


def changed(**settings) -> str:
    """The configuration above with `SECTION__NAME=value`, as YAML."""
    tree = copy.deepcopy(PYCLS)
    for key, value in settings.items():
        section, name = key.split("__")
        tree[section][name] = value
    return yaml.safe_dump(tree)


def check(saved: str, *overrides: str) -> list[str]:
    return check_saved_settings(saved, load_cfg(None, overrides), Path("w.pyth"))


def test_an_anynet_has_its_stride_in_the_3x3_whatever_resnet_says():
    assert check(changed(), "RESNET.STRIDE_1X1", "False") == []
    with pytest.raises(ValueError, match="w.pyth: trained with RESNET.STRIDE_1X1 False, here it is True"):
        check(changed())


@pytest.mark.parametrize("stride", [True, False])
def test_a_resnet_has_it_where_resnet_says(stride):
    kind = {"MODEL__TYPE": "resnet", "MODEL__DEPTH": 50, "RESNET__TRANS_FUN": "bottleneck_transform"}
    saved = changed(**kind, RESNET__STRIDE_1X1=stride)
    assert check(saved, "RESNET.STRIDE_1X1", str(stride)) == []
    with pytest.raises(ValueError, match=f"trained with RESNET.STRIDE_1X1 {stride}, here it is {not stride}"):
        check(saved, "RESNET.STRIDE_1X1", str(not stride))


def test_basic_blocks_have_no_such_stride():
    saved = changed(MODEL__TYPE="resnet", MODEL__DEPTH=18)
    for kind in (saved, changed(ANYNET__BLOCK_TYPE="res_basic_block")):
        assert network_settings(yaml.safe_load(kind), source="w") == {"BN.EPS": 1e-05}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ANYNET__STRIDES": [1, 2, 2, 1]}, r"trained with ANYNET.STRIDES \[1, 2, 2, 1\], a ResNet has \[1, 2, 2, 2\]"),
        ({"ANYNET__STEM_TYPE": "simple_stem_in"}, "trained with ANYNET.STEM_TYPE simple_stem_in"),
        ({"ANYNET__BLOCK_TYPE": "res_bottleneck_linear_block"}, "trained with ANYNET.BLOCK_TYPE res_bottleneck_linear"),
        ({"ANYNET__SE_ON": True}, "trained with ANYNET.SE_ON True"),
        ({"MODEL__ACTIVATION_FUN": "silu"}, "trained with MODEL.ACTIVATION_FUN silu, here it is relu"),
        ({"MODEL__TYPE": "regnet"}, r"weights of a RegNet \(MODEL.TYPE regnet\), not of a ResNet"),
        ({"MODEL__TYPE": "effnet"}, "weights of an EfficientNet"),
        ({"MODEL__TYPE": "vit"}, "weights of a vision transformer"),
        ({"BN__EPS": 1e-3}, "trained with BN.EPS 0.001, here it is 1e-05"),
        ({"BN__EPS": "1e-3"}, "trained with BN.EPS 0.001, here it is 1e-05"),
    ],
)
def test_networks_that_only_the_configuration_tells_apart_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=f"w.pyth: {words}"):
        check(changed(**settings), "RESNET.STRIDE_1X1", "False")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ("{", "cannot be read"),
        ("a: &a [*a]", "stands inside what it refers to"),
        (7, "it is a int"),
        (changed(MODEL__TYPE="mine"), "MODEL.TYPE mine, which is not known here"),
    ],
)
def test_what_cannot_be_checked_is_told(saved, words):
    (note,) = check(saved, "RESNET.STRIDE_1X1", "False")
    assert note.startswith("w.pyth: ") and words in note


@pytest.mark.parametrize("saved", ["{MODEL: {TYPE: [1]}}", "{MODEL: 3, BN: {EPS: x}}", "{ANYNET: 3, BN: 4}"])
def test_values_of_other_types_do_no_harm(saved):
    check(saved, "RESNET.STRIDE_1X1", "False")


def test_a_mapping_is_read_as_its_yaml_would_be():
    assert network_settings(PYCLS, source="w") == {"RESNET.STRIDE_1X1": False, "BN.EPS": 1e-05}


def thin_network(monkeypatch) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Settings and float64 weights, by formula, of a ResNet-50 of few channels under pycls' names."""
    monkeypatch.setattr(resnet, "STEM_WIDTH", 4)
    monkeypatch.setattr(resnet, "BOTTLENECK_WIDTHS", (8, 16, 32, 64))
    settings = ["RESNET.STRIDE_1X1", "False", "RESNET.WIDTH_PER_GROUP", "2", "NUM_GPUS", "0", "MODEL.NUM_CLASSES", "3"]
    own = resnet.ResNet(50, width_per_group=2).state_dict()
    return settings, {key: weight_by_formula(key, value) for key, value in own.items()}


def weight_by_formula(key: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    numbers = torch.arange(value.numel(), dtype=torch.float64) + len(key)
    wave = (numbers * 0.7).sin().reshape(value.shape)
    if key.endswith(("running_var", "bn.weight")):
        return 1 + 0.3 * wave
    return wave * (2 / max(1, value[0].numel())) ** 0.5 if value.dim() == 4 else 0.1 * wave


def images() -> torch.Tensor:
    return (torch.arange(2 * 3 * 64 * 64, dtype=torch.float64) * 0.37).cos().reshape(2, 3, 64, 64)


def test_features_are_those_of_pycls(monkeypatch, tmp_path):
    """A file as pycls writes it: its saved `RESNET.STRIDE_1X1 True` was never read, and its features tell."""
    settings, state = thin_network(monkeypatch)
    head = {"head.fc.weight": torch.ones(9, 64), "head.fc.bias": torch.ones(9)}
    path = tmp_path / "R-50.pyth"
    content = {"epoch": 99, "test_err": 23.2, "ema_err": 99.9, "model_state": {**state, **head}, "cfg": changed()}
    torch.save({**content, "ema_state": {key: torch.zeros_like(value) for key, value in state.items()}}, path)
    cfg = load_cfg(None, [*settings, "TRAIN.WEIGHTS", str(path)])
    model = build_classifier(cfg).double().eval()
    load_initial_weights(cfg, model)
    f3, f4 = model.globalmodel(images())
    for maps, expected in ((f3, F3), (f4, F4)):
        found = maps.flatten()[:: maps.numel() // 6][:6]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_describer_takes_what_the_run_used(tmp_path, monkeypatch):
    content = {"cfg": changed(), "model_state": {"a": torch.ones(1)}}
    monkeypatch.setattr("evaler.network.read_checkpoint", lambda path: content)
    settings = settings_of("w.pyth")
    assert settings[settings.index("RESNET.STRIDE_1X1") + 1] == "False"
    assert get_cfg().RESNET.STRIDE_1X1
