import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from core.builders import build_classifier, build_descriptor, load_initial_weights, load_tested_weights
from core.checkpoint import check_saved_settings, checkpoint_path, newest_checkpoint, resume, save_checkpoint
from core.config import get_cfg, load_cfg
from core.optimizer import build_sgd
from model.weights import WeightsError
from tests.small_run import ROOT, child_environment


def network(seed: int = 0, *, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def optimizer_of(model: nn.Module, **settings) -> torch.optim.SGD:
    defaults = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01}
    return build_sgd(model, **(defaults | settings))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, count: int = 3) -> list[float]:
    torch.manual_seed(seed)
    losses = []
    for _ in range(count):
        loss = model(torch.randn(8, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *momenta)]


@pytest.fixture
def cfg(tmp_path):
    return load_cfg(None, ["OUT_DIR", str(tmp_path / "out"), "OPTIM.BASE_LR", "0.25"])


@pytest.fixture
def trained():
    model = network()
    optimizer = optimizer_of(model)
    steps(model, optimizer, seed=1)
    return model, optimizer


def test_the_published_layout(cfg, trained, tmp_path):
    model, optimizer = trained
    path = save_checkpoint(cfg, model, optimizer, epochs_done=1)
    assert path == tmp_path / "out" / "checkpoints" / "model_epoch_0001.pyth"
    assert [p.name for p in path.parent.iterdir()] == ["model_epoch_0001.pyth"]
    content = torch.load(path, weights_only=True)
    assert list(content) == ["epoch", "model_state", "optimizer_state", "cfg"]
    assert content["epoch"] == 0
    assert list(content["model_state"]) == list(model.state_dict())
    assert set(content["optimizer_state"]) == {"state", "param_groups"}
    saved_cfg = tmp_path / "saved.yaml"
    saved_cfg.write_text(content["cfg"])
    assert load_cfg(saved_cfg) == cfg


@pytest.mark.parametrize(("done", "name"), [(0, "model_epoch_0000.pyth"), (12345, "model_epoch_12345.pyth")])
def test_names_at_the_ends(done, name):
    assert checkpoint_path("out", done) == Path("out/checkpoints") / name


def test_resuming_restores_weights_statistics_and_momentum_exactly(cfg, trained):
    model, optimizer = trained
    path = save_checkpoint(cfg, model, optimizer, epochs_done=7)
    expected = state_of(model, optimizer)
    other = network(seed=5)
    other_optimizer = optimizer_of(other)
    assert resume(path, other, other_optimizer) == 7
    for got, want in zip(state_of(other, other_optimizer), expected, strict=True):
        assert torch.equal(got, want)
    assert steps(other, other_optimizer, seed=9) == steps(model, optimizer, seed=9)
    assert all(
        torch.equal(a, b) for a, b in zip(state_of(other, other_optimizer), state_of(model, optimizer), strict=True)
    )


def test_the_configuration_of_now_decides_rates_and_decay(cfg, trained):
    path = save_checkpoint(cfg, *trained, epochs_done=1)
    model = network()
    optimizer = optimizer_of(model, lr=0.5, weight_decay=0.0, momentum=0.8, nesterov=False)
    resume(path, model, optimizer)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (0.5, 0.0, 0.8, False)


def test_before_the_first_step_there_is_no_momentum(cfg):
    model = network()
    path = save_checkpoint(cfg, model, optimizer_of(model), epochs_done=0)
    assert resume(path, network(3), optimizer_of(network(3))) == 0


def test_the_newest_is_the_one_with_the_largest_number(tmp_path):
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(tmp_path) is None
    folder.mkdir()
    assert newest_checkpoint(tmp_path) is None
    for name in (
        "model_epoch_9999.pyth",
        "model_epoch_10000.pyth",
        "model_epoch_0003.pyth",
        ".model_epoch_20000.pyth.abc.tmp",
        "model_epoch_20001.pyth.tmp",
        "model_epoch_20002.pyth~",
        "old_model_epoch_20003.pyth",
        "model_epoch_77.pyth",
        "model_epoch_.pyth",
        "best.pyth",
    ):
        (folder / name).touch()
    assert newest_checkpoint(tmp_path) == folder / "model_epoch_10000.pyth"


def damaged(path: Path, **changes) -> Path:
    """The checkpoint with some entries replaced, or removed where the value is None."""
    content = {**torch.load(path, weights_only=True), **changes}
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_state": None}, "no checkpoint of a training run, it lacks optimizer_state$"),
        ({"optimizer_state": None, "epoch": None}, "it lacks epoch, optimizer_state$"),
        ({"epoch": "three"}, "it lacks epoch$"),
        ({"model_state": {}}, "holds no model_state"),
        ({"optimizer_state": {"state": {}}}, "its optimizer state does not fit this configuration"),
        ({"optimizer_state": {"state": {}, "param_groups": []}}, "its optimizer state does not fit this configuration"),
    ],
)
def test_what_is_no_checkpoint_of_a_run_is_refused(cfg, trained, changes, message):
    path = damaged(save_checkpoint(cfg, *trained, epochs_done=1), **changes)
    model = network()
    with pytest.raises(ValueError, match=rf"^{path}: .*{message}") as raised:
        resume(path, model, optimizer_of(model))
    assert "\n" not in str(raised.value)


def test_a_bare_state_dict_is_refused(cfg, trained, tmp_path):
    path = tmp_path / "bare.pyth"
    torch.save(trained[0].state_dict(), path)
    with pytest.raises(ValueError, match=f"^{path}: no checkpoint of a training run"):
        resume(path, network(), optimizer_of(network()))


def test_weights_of_another_shape_are_refused_and_nothing_is_changed(cfg, trained):
    path = save_checkpoint(cfg, *trained, epochs_done=1)
    model = network(2, width=5)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with pytest.raises(WeightsError, match=rf"^{path}: .*0\.weight \[4, 3\] \(here \[5, 3\]\)"):
        resume(path, model, optimizer_of(model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))


def test_parameters_in_another_order_are_refused(cfg):
    """The optimiser numbers its parameters; with another order, momenta of equal shape would be exchanged silently."""

    class Pair(nn.Module):
        def __init__(self, names: list[str]):
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(2, 2))

    ab, ba = Pair(["a", "b"]), Pair(["b", "a"])
    path = save_checkpoint(cfg, ab, optimizer_of(ab), epochs_done=1)
    with pytest.raises(ValueError, match="its parameters stand in another order"):
        resume(path, ba, optimizer_of(ba))


def test_momentum_of_other_groups_is_refused(cfg, trained):
    path = save_checkpoint(cfg, *trained, epochs_done=1)
    model = network()
    with pytest.raises(ValueError, match="its optimizer state does not fit this configuration"):
        resume(path, model, optimizer_of(model, bn_weight_decay=0.0))


def test_a_file_cut_short_is_refused(cfg, trained):
    path = save_checkpoint(cfg, *trained, epochs_done=1)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(WeightsError, match=rf"^{path}: not a readable weight file"):
        resume(path, network(), optimizer_of(network()))


SAVE_FOR_EVER = """
import sys, torch
from core import checkpoint
from core.config import get_cfg, load_cfg
from core.optimizer import build_sgd

model = torch.nn.Linear(2000, 2000)
settings = dict(lr=0.1, momentum=0.9, dampening=0.0, nesterov=True, weight_decay=0.0)
cfg, optimizer = load_cfg(None, ["OUT_DIR", sys.argv[1]]), build_sgd(model, **settings)
checkpoint.save_checkpoint(cfg, model, optimizer, epochs_done=1)
print("saved", flush=True)
real = torch.save
def slowly(content, file):  # the file is there, half of the content is written
    real(content, file)
    file.flush()
    file.truncate(file.tell() // 2)
    print("half", flush=True)
    import time; time.sleep(120)
checkpoint.torch.save = slowly
checkpoint.save_checkpoint(cfg, model, optimizer, epochs_done=2)
"""


def test_a_process_killed_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path):
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["saved\n", "half\n"]
        process.send_signal(signal.SIGKILL)
    first = tmp_path / "checkpoints" / "model_epoch_0001.pyth"
    (half,) = set(first.parent.iterdir()) - {first}
    assert half.name.endswith(".tmp") and 0 < half.stat().st_size < first.stat().st_size
    assert newest_checkpoint(tmp_path) == first
    model = nn.Linear(2000, 2000)
    assert resume(first, model, optimizer_of(model)) == 1


SAVE_AGAIN_AND_AGAIN = """
import itertools, sys, torch
from core.checkpoint import save_checkpoint
from core.config import get_cfg, load_cfg
from core.optimizer import build_sgd

model = torch.nn.Linear(1000, 1000)
settings = dict(lr=0.1, momentum=0.9, dampening=0.0, nesterov=True, weight_decay=0.0)
cfg, optimizer = load_cfg(None, ["OUT_DIR", sys.argv[1]]), build_sgd(model, **settings)
print("ready", flush=True)
for n in itertools.count(1):
    torch.nn.init.constant_(model.weight, n)
    save_checkpoint(cfg, model, optimizer, epochs_done=1 + n % 2)
"""


def test_whenever_a_process_is_killed_every_checkpoint_there_is_whole(tmp_path):
    command = [sys.executable, "-c", SAVE_AGAIN_AND_AGAIN, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        while newest_checkpoint(tmp_path) is None:
            time.sleep(0.01)
        time.sleep(0.53)
        process.send_signal(signal.SIGKILL)
    for path in (tmp_path / "checkpoints").glob("*.pyth"):
        weight = torch.load(path, weights_only=True)["model_state"]["weight"]
        assert weight.eq(weight[0, 0]).all() and weight[0, 0] >= 1


@pytest.mark.parametrize(
    ("saved", "said"),
    [("{RESNET: {STRIDE_1X1: false}}", "RESNET.STRIDE_1X1 False"), ("{BN: {EPS: 0.001}}", "BN.EPS 0.001")],
)
def test_weights_trained_with_another_setting_that_no_shape_shows_are_refused(saved, said):
    with pytest.raises(ValueError, match=re.escape(f"w.pyth: trained with {said}, here it is")):
        check_saved_settings(saved, get_cfg(), Path("w.pyth"))


@pytest.mark.parametrize(
    "saved",
    [
        "{RESNET: {STRIDE_1X1: true, DEPTH: 3}, BN: {EPS: 1.0e-05}}",
        "{BN: {EPS: 1e-05}}",  # text to PyYAML
        "{RESNET: [1]}",
        "RESNET",
        "{",
        "",
        3,
        None,
    ],
)
def test_a_saved_configuration_that_agrees_or_says_nothing_is_no_hindrance(saved):
    assert check_saved_settings(saved, get_cfg(), Path("w.pyth")) is None


def test_every_load_of_weights_holds_the_saved_configuration_against_ours_after_the_architecture(tmp_path):
    path = tmp_path / "r18.pyth"
    small = ["MODEL.DEPTH", "18", "RESNET.TRANS_FUN", "basic_transform", "MODEL.S3_DIM", "256", "MODEL.S4_DIM", "512"]
    small += ["MODEL.HEADS.IN_FEAT", "512", "MODEL.NUM_CLASSES", "3"]
    trained = load_cfg(None, [*small, "RESNET.STRIDE_1X1", "False"])
    torch.save({"model_state": build_classifier(trained).state_dict(), "cfg": trained.dump()}, path)
    weights = ["TEST.WEIGHTS", str(path), "TRAIN.WEIGHTS", str(path)]
    for build, load in ((build_descriptor, load_tested_weights), (build_classifier, load_initial_weights)):
        same = load_cfg(None, [*small, *weights, "RESNET.STRIDE_1X1", "False"])
        load(same, build(same))
        stride = load_cfg(None, [*small, *weights, "RESNET.STRIDE_1X1", "True"])
        with pytest.raises(ValueError, match="trained with RESNET.STRIDE_1X1 False, here it is True"):
            load(stride, build(stride))
        deeper = load_cfg(None, ["MODEL.NUM_CLASSES", "3", *weights])
        with pytest.raises(WeightsError, match="weights of another architecture: MODEL.DEPTH 18"):
            load(deeper, build(deeper))
