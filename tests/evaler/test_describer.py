"""Descriptors from Python: the architecture comes from the file, the numbers are those of the command."""

import numpy as np
import pytest
import torch

from core import builders
from core.config import load_cfg
from datasets.images.decode import ImageError, decode
from evaler.describer import load
from evaler.extraction import command as extract
from evaler.features import store as features
from evaler.network import settings_of
from model.weights.loading import WeightsError
from tests.small_run import ROOT, SMALL_MODEL, overrides, photograph, python, script, write_image

BASIC = {"MODEL.DEPTH": 18, "RESNET.TRANS_FUN": "basic_transform", "RESNET.STRIDE_1X1": False}
BASIC |= {"MODEL.S3_DIM": 256, "MODEL.S4_DIM": 512, "MODEL.HEADS.REDUCTION_DIM": 8}
MODELS = {
    "small": SMALL_MODEL,
    "multi-atrous": SMALL_MODEL | {"MODEL.WITH_MA": True},
    "global": SMALL_MODEL | {"MODEL.FUSION": "global", "MODEL.HEADS.IN_FEAT": 2048},
    "basic": BASIC | {"MODEL.HEADS.IN_FEAT": 512},
    "basic, global": BASIC | {"MODEL.FUSION": "global", "MODEL.HEADS.IN_FEAT": 512},
}


def write_weights(path, settings, **content):
    torch.manual_seed(1)
    network = builders.build_descriptor(load_cfg(None, overrides(settings)))
    torch.save({"model_state": network.state_dict(), **content} if content else network.state_dict(), path)
    return path


@pytest.fixture
def photographs(tmp_path):
    return [write_image(tmp_path / "photos" / f"{i}.png", photograph(i, 40 + i, 48)) for i in range(3)]


@pytest.mark.parametrize("name", MODELS)
def test_the_architecture_is_read_off_the_file(tmp_path, photographs, name):
    path = write_weights(tmp_path / "w.pyth", MODELS[name])
    found, expected = load_cfg(None, settings_of(path)), load_cfg(None, overrides(MODELS[name]))
    keys = ("DEPTH", "S3_DIM", "S4_DIM", "WITH_MA", "FUSION")
    assert [found.MODEL[key] for key in keys] == [expected.MODEL[key] for key in keys]
    assert found.RESNET == expected.RESNET and found.MODEL.HEADS.IN_FEAT == expected.MODEL.HEADS.IN_FEAT
    vectors = load(path, scales=[1.0])(photographs)
    assert vectors.shape == (3, 8) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_the_same_descriptors_as_the_command(tmp_path, photographs):
    path = write_weights(tmp_path / "w.pyth", SMALL_MODEL)
    (tmp_path / "some.yaml").touch()
    settings = {"NUM_GPUS": 0, "OUT_DIR": tmp_path, "INFER.IMAGES": tmp_path / "photos", "TEST.WEIGHTS": path}
    extract.main(["--cfg", str(tmp_path / "some.yaml"), *overrides(SMALL_MODEL, settings)])
    expected = features.load(tmp_path / "features" / "photos", "images").vectors
    describe = load(path)
    np.testing.assert_array_equal(describe(photographs), expected)
    np.testing.assert_array_equal(describe(str(photographs[1])), expected[1])
    np.testing.assert_array_equal(describe([decode(photographs[2])]), expected[2:])


def test_what_only_the_saved_configuration_tells(tmp_path):
    settings = SMALL_MODEL | {"RESNET.STRIDE_1X1": True, "BN.EPS": 1e-3}
    cfg = load_cfg(None, overrides(settings))
    path = write_weights(tmp_path / "w.pyth", settings, cfg=cfg.dump())
    found = load_cfg(None, settings_of(path))
    assert found.RESNET.STRIDE_1X1 and found.BN.EPS == 1e-3
    load(path)


def test_mistakes(tmp_path, photographs):
    with pytest.raises(WeightsError, match="no such weight file"):
        load(tmp_path / "absent.pyth")
    (tmp_path / "text.pyth").write_text("hello")
    with pytest.raises(WeightsError, match="not a (readable )?weight file"):
        load(tmp_path / "text.pyth")
    describe = load(write_weights(tmp_path / "w.pyth", SMALL_MODEL))
    with pytest.raises(ImageError, match="absent.jpg: no such file"):
        describe([photographs[0], tmp_path / "absent.jpg"])
    for pixels in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"pixels are uint8 \[H, W, 3\]"):
            describe(pixels)
    thin = write_image(tmp_path / "thin.png", photograph(0, 1, 40))
    with pytest.raises(ImageError, match=r"thin\.png: an image of 40 x 1 pixels has nothing left at scale"):
        describe(thin)


@pytest.mark.parametrize(("key", "value", "length"), [("fc.weight", 0.0, "0"), ("fc.bias", 1e25, "0")])
def test_a_descriptor_that_is_zero_or_not_finite_never_leaves(tmp_path, photographs, key, value, length):
    state = dict(torch.load(write_weights(tmp_path / "w.pyth", SMALL_MODEL), weights_only=True))
    state["fc.bias"] = torch.zeros_like(state["fc.bias"])
    state[key] = torch.full_like(state[key], value)
    torch.save(state, tmp_path / "w.pyth")
    describe = load(tmp_path / "w.pyth", scales=[1.0])
    with pytest.raises(ValueError, match=rf"{photographs[0]}: its descriptor has length {length}, not 1"):
        describe(photographs)
    with pytest.raises(ValueError, match=f"an image: its descriptor has length {length}"):
        describe(decode(photographs[0]))


def test_the_pycls_average_is_told_by_its_errors(tmp_path):
    """From Python too: the architecture and the weights are those of the better set."""
    path = write_weights(tmp_path / "w.pyth", SMALL_MODEL, test_err=20.0, ema_err=99.0)
    content = torch.load(path, weights_only=True)
    broken = {key: torch.full_like(value, 0) for key, value in content["model_state"].items()}
    torch.save(content | {"ema_state": broken}, path)
    describe = load(path, scales=[1.0])
    describe(np.full((40, 40, 3), 99, np.uint8))
    assert any("the last weights are used, not their moving average" in note for note in describe.notes)


def test_from_torch_hub(tmp_path, photographs):
    write_weights(tmp_path / "w.pyth", SMALL_MODEL)
    source = f"""
import torch
describe = torch.hub.load({str(ROOT)!r}, "dolg", weights="w.pyth", scales=[1.0], source="local")
vectors = describe([{str(photographs[0])!r}])
print(vectors.shape)
"""
    result = python(script(tmp_path, source), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "(1, 8)"
