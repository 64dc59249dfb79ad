"""The state of a run as a checkpoint holds it, and what is refused when it does not fit."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from core.average import MovingAverage
from core.checkpoint import checkpoint_path, write_checkpoint
from core.config import load_cfg
from core.optimizer import build_sgd, parameter_groups
from core.position import Position
from core.resume import restore, state_of
from model.weights import WeightsError

CPU = torch.device("cpu")


def network(seed: int = 0, *, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def optimizer_of(model: nn.Module, *, bn_weight_decay: float | None = None, **settings) -> torch.optim.SGD:
    defaults = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01}
    return build_sgd(parameter_groups(model, bn_weight_decay=bn_weight_decay), **(defaults | settings))


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


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *momenta)]


@pytest.fixture
def cfg(tmp_path):
    return load_cfg(None, ["OUT_DIR", str(tmp_path / "out"), "OPTIM.BASE_LR", "0.25", "TRAIN.BATCH_SIZE", "12"])


@pytest.fixture
def trained():
    model = network()
    optimizer = optimizer_of(model)
    steps(model, optimizer, seed=1)
    return model, optimizer


def at(epochs_done: int, iteration: int = 0) -> Position:
    position = Position(CPU, epochs_done, iteration)
    position.epoch.add(torch.tensor(0.1), torch.tensor([0, 3]))
    position.period.add(torch.tensor(0.7), torch.tensor([9]))
    position.lowest_error, position.best_score, position.broken = 12.5, -12.5, ["list, line 3: broken"]
    return position


def saved(cfg, trained, position: Position | None = None, **more) -> Path:
    position = position or at(1)
    path = checkpoint_path(cfg.OUT_DIR, *position.place)
    write_checkpoint(state_of(cfg, *trained, position, **more), path)
    return path


def test_the_published_layout_and_plain_values_beside_it(cfg, trained, tmp_path):
    content = torch.load(saved(cfg, trained, at(2, 5), lists={"training": "ab"}), weights_only=True)
    assert list(content) == ["epoch", "iteration", "model_state", "optimizer_state", "cfg", "run"]
    assert (content["epoch"], content["iteration"]) == (1, 5)
    assert list(content["model_state"]) == list(trained[0].state_dict())
    assert set(content["optimizer_state"]) == {"state", "param_groups"}
    saved_cfg = tmp_path / "saved.yaml"
    saved_cfg.write_text(content["cfg"])
    assert load_cfg(saved_cfg) == cfg
    assert content["run"]["lists"] == {"training": "ab"} and content["run"]["batch_size"] == 12


def test_resuming_restores_everything_exactly(cfg, trained):
    model, optimizer = trained
    path = saved(cfg, trained, at(7, 3))
    expected = state(model, optimizer)
    other = network(seed=5)
    other_optimizer, position = optimizer_of(other), Position(CPU)
    assert restore(path, cfg, other, other_optimizer, position) == []
    assert position.place == (7, 3) and position.shared() == at(7, 3).shared()
    assert position.sums() == at(7, 3).sums()
    for got, want in zip(state(other, other_optimizer), expected, strict=True):
        assert torch.equal(got, want)
    assert steps(other, other_optimizer, seed=9) == steps(model, optimizer, seed=9)
    for got, want in zip(state(other, other_optimizer), state(model, optimizer), strict=True):
        assert torch.equal(got, want)


def test_a_checkpoint_of_the_published_code_begins_the_next_epoch(cfg, trained):
    path = saved(cfg, trained, at(3))
    content = torch.load(path, weights_only=True)
    torch.save({key: content[key] for key in ("epoch", "model_state", "optimizer_state", "cfg")}, path)
    position = Position(CPU)
    assert restore(path, cfg, *trained, position, lists={"training": "ab"}) == []
    assert position.place == (3, 0) and position.lowest_error == math.inf


def test_the_configuration_of_now_decides_rates_and_decay_and_what_changed_is_said(cfg, trained, tmp_path):
    path = saved(cfg, trained)
    model = network()
    optimizer = optimizer_of(model, lr=0.5, weight_decay=0.0, momentum=0.8, nesterov=False)
    now = load_cfg(None, ["OUT_DIR", str(tmp_path), "OPTIM.BASE_LR", "0.5", "TRAIN.BATCH_SIZE", "12", "PORT", "77"])
    notes = restore(path, now, model, optimizer, Position(CPU))
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (0.0, 0.8, False)
    assert notes == ["settings changed since model_epoch_0001.pyth was written: OPTIM.BASE_LR 0.25 -> 0.5"]


def test_before_the_first_step_there_is_no_momentum(cfg):
    model = network()
    path = saved(cfg, (model, optimizer_of(model)), Position(CPU))
    position = Position(CPU, 5)
    restore(path, cfg, network(3), optimizer_of(network(3)), position)
    assert position.place == (0, 0)


@pytest.mark.parametrize(("batch", "iteration", "again"), [(12, 5, None), (6, 10, 0), (20, 3, 0), (24, 2, 12)])
def test_inside_an_epoch_another_batch_size_goes_on_behind_the_same_images(cfg, trained, batch, iteration, again):
    path = saved(cfg, trained, at(2, 5))  # after 60 images
    now = load_cfg(None, ["OUT_DIR", cfg.OUT_DIR, "OPTIM.BASE_LR", "0.25", "TRAIN.BATCH_SIZE", str(batch)])
    position = Position(CPU)
    notes = restore(path, now, *trained, position)
    assert position.place == (2, iteration)
    if again is not None:
        assert f"after 60 images of this epoch it goes on at iteration {iteration + 1}; {again} images" in notes[0]


def test_another_seed_inside_an_epoch_and_another_number_of_processes_are_said(cfg, trained):
    path = saved(cfg, trained, at(2, 5))
    content = torch.load(path, weights_only=True)
    content["run"]["sums"] *= 4
    torch.save(content, path)
    now = load_cfg(None, ["OUT_DIR", cfg.OUT_DIR, "OPTIM.BASE_LR", "0.25", "TRAIN.BATCH_SIZE", "12", "RNG_SEED", "9"])
    position = Position(CPU)
    notes = "\n".join(restore(path, now, *trained, position))
    assert "RNG_SEED was 1: the rest of this epoch stands in another order" in notes
    assert "4 processes before, 1 now: batches hold the same images" in notes and "12 of them at a time" in notes
    assert position.epoch.images == 4 * 2 and position.period.images == 4


def test_the_average_and_the_scaler_come_back(cfg, trained):
    model, optimizer = trained
    average = MovingAverage(model, 0.5)
    steps(model, optimizer, seed=4)
    average.update(100)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    path = saved(cfg, trained, average=average.network, scaler=scaler.state_dict())
    other = network(7)
    another, fresh = MovingAverage(other, 0.5), torch.amp.GradScaler("cpu")
    notes = restore(path, cfg, other, optimizer_of(other), Position(CPU), average=another.network, scaler=fresh)
    assert notes == [] and fresh.get_scale() == 8.0
    for got, want in zip(another.network.state_dict().values(), average.network.state_dict().values(), strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(another.network[0].weight, model[0].weight)


def test_an_average_begun_later_starts_from_the_weights(cfg, trained):
    path = saved(cfg, trained)
    other = network(7)
    average = MovingAverage(other, 0.5)
    notes = restore(path, cfg, other, optimizer_of(other), Position(CPU), average=average.network)
    assert len(notes) == 1 and "holds no moving average" in notes[0]
    assert torch.equal(average.network[0].weight, trained[0][0].weight)


# ----------------------------------------------------------------------------------------------------------- refused


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
        ({"optimizer_state": {"param_groups": []}}, "its optimizer state does not fit this configuration"),
        ({"optimizer_state": {"state": {}, "param_groups": []}}, "its optimizer state does not fit this configuration"),
        (
            {"optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(2, 9)}}, "param_groups": [{}]}},
            r"does not fit this configuration \('momentum_buffer of parameter 0 is \[2, 9\]'\)",
        ),
    ],
)
def test_what_is_no_checkpoint_of_a_run_is_refused(cfg, trained, changes, message):
    path = damaged(saved(cfg, trained), **changes)
    model = network()
    with pytest.raises(ValueError, match=rf"^{path}: .*{message}") as raised:
        restore(path, cfg, model, optimizer_of(model), Position(CPU))
    assert "\n" not in str(raised.value)


def test_a_bare_state_dict_is_refused(cfg, trained, tmp_path):
    path = tmp_path / "bare.pyth"
    torch.save(trained[0].state_dict(), path)
    with pytest.raises(ValueError, match=f"^{path}: no checkpoint of a training run"):
        restore(path, cfg, *trained, Position(CPU))


def test_another_list_is_refused_with_the_difference(cfg, trained):
    path = saved(cfg, trained, lists={"training": "a" * 64, "validation": "b" * 64})
    restore(path, cfg, *trained, Position(CPU), lists={"training": "a" * 64})
    with pytest.raises(ValueError, match=r"trained with another training list \(sha256 aaaaaaaa, here cccccccc\)"):
        restore(path, cfg, *trained, Position(CPU), lists={"training": "c" * 64})


def test_weights_of_another_shape_are_refused_and_nothing_is_changed(cfg, trained):
    path = saved(cfg, trained)
    model = network(2, width=5)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with pytest.raises(WeightsError, match=rf"^{path}: .*0\.weight \[4, 3\] \(here \[5, 3\]\)"):
        restore(path, cfg, model, optimizer_of(model), Position(CPU))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))


def test_parameters_in_another_order_are_refused(cfg):
    """The optimiser numbers its parameters; with another order, momenta of equal shape would be exchanged silently."""

    class Pair(nn.Module):
        def __init__(self, names: list[str]):
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(2, 2))

    ab, ba = Pair(["a", "b"]), Pair(["b", "a"])
    path = saved(cfg, (ab, optimizer_of(ab)))
    with pytest.raises(ValueError, match="its parameters stand in another order"):
        restore(path, cfg, ba, optimizer_of(ba), Position(CPU))


def test_momentum_of_other_groups_is_refused(cfg, trained):
    path = saved(cfg, trained)
    model = network()
    with pytest.raises(ValueError, match="its optimizer state does not fit this configuration"):
        restore(path, cfg, model, optimizer_of(model, bn_weight_decay=0.0), Position(CPU))
