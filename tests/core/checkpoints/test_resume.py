"""The state of a run as a checkpoint holds it, and what is refused when it does not fit."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from core.average import MovingAverage
from core.checkpoints.checkpoint import checkpoint_path, write_checkpoint
from core.checkpoints.position import Position
from core.checkpoints.resume import restore, state_of
from core.config import load_cfg
from core.optimizer import build_adamw, build_sgd, parameter_groups
from model.margin import CosineHead
from model.weights.loading import WeightsError

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


def as_published(path: Path) -> Path:
    """The checkpoint as the published code writes it: without a `run`, momentum contiguous and by number only."""
    content = torch.load(path, weights_only=True)
    optimizer = content["optimizer_state"]
    for entry in optimizer["state"].values():
        entry.update({name: value.contiguous() for name, value in entry.items()})
    for group in optimizer["param_groups"]:
        group.pop("param_names", None)
    torch.save({key: content[key] for key in ("epoch", "model_state", "optimizer_state", "cfg")}, path)
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
    path = as_published(saved(cfg, trained, at(3)))
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


class Pair(nn.Module):
    """Two layers of one shape, in either order."""

    def __init__(self, names: str):
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            setattr(self, name, nn.Linear(3, 3))
            self.get_submodule(name).bias.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.a(self.b(images))


def momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_state_finds_its_parameter_by_name(cfg):
    """Of equal shapes; in another order, which numbers alone would not show, and in groups of their own."""
    ab, ba = Pair("ab"), Pair("ba")
    optimizer = optimizer_of(ab)
    steps(ab, optimizer, seed=1)
    path = saved(cfg, (ab, optimizer))
    other = build_sgd(
        parameter_groups(ba, head=ba.a, head_lr_mult=2.0),
        lr=0.1,
        momentum=0.9,
        dampening=0.0,
        nesterov=True,
        weight_decay=0.0,
    )
    assert restore(path, cfg, ba, other, Position(CPU)) == []
    found, expected = momentum(ba, other), momentum(ab, optimizer)
    assert found.keys() == {"a.weight", "b.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["a.weight"], found["b.weight"])
    with pytest.raises(ValueError, match=r"optimizer_state does not fit: it numbers the parameters, which stand in an"):
        restore(as_published(path), cfg, ba, other, Position(CPU))


def test_what_is_trained_only_now_begins_at_zero_and_goes_on(cfg, trained):
    """Frozen first, thawed later; torch's fused SGD breaks where some parameters have momentum and others none."""
    model = network()
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model)
    steps(model, optimizer, seed=1)
    path = saved(cfg, (model, optimizer))
    other = network(2)
    thawed = optimizer_of(other)
    notes = restore(path, cfg, other, thawed, Position(CPU))
    assert notes == ["no optimizer state for 0.weight, 0.bias: it begins at zero there"]
    found, expected = momentum(other, thawed), momentum(model, optimizer)
    assert not found["0.weight"].any() and not found["0.bias"].any()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps(other, thawed, seed=3)
    assert momentum(other, thawed)["0.weight"].any()
    path = saved(cfg, (other, thawed))
    again = network(4)
    again[0].requires_grad_(False)
    frozen = optimizer_of(again)
    assert restore(path, cfg, again, frozen, Position(CPU)) == []
    steps(again, frozen, seed=5)


def test_another_optimizer_begins_anew(cfg, trained):
    path = saved(cfg, trained)
    model = network(2)
    adamw = build_adamw(parameter_groups(model), lr=0.1, betas=[0.9, 0.99], weight_decay=0.0)
    notes = restore(path, cfg, model, adamw, Position(CPU))
    assert notes == ["OPTIM.OPTIMIZER was sgd: adamw begins without what that had gathered"]
    assert not adamw.state
    steps(model, adamw, seed=3)
    path = saved(cfg, (model, adamw))
    assert restore(path, cfg, *trained, Position(CPU))[0].startswith("OPTIM.OPTIMIZER was adamw: sgd begins")
    other = network(5)
    same = build_adamw(parameter_groups(other), lr=0.1, betas=[0.9, 0.99], weight_decay=0.0)
    assert restore(path, cfg, other, same, Position(CPU)) == []
    assert steps(other, same, seed=9) == steps(model, adamw, seed=9)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64)])
def test_adamw_counts_its_steps_as_the_fused_kernel_needs_them(cfg, step):
    """Other implementations, and older ones, keep a number, or a tensor of another type."""
    model = network()
    optimizer = build_adamw(parameter_groups(model), lr=0.1, betas=[0.9, 0.99], weight_decay=0.0)
    steps(model, optimizer, seed=3)
    path = saved(cfg, (model, optimizer))
    content = torch.load(path, weights_only=True)
    for entry in content["optimizer_state"]["state"].values():
        assert entry["step"] == 3
        entry["step"] = step
    for group in content["optimizer_state"]["param_groups"]:
        group |= {"fused": None, "foreach": True, "capturable": False}
    torch.save(content, path)
    other = network(5)
    same = build_adamw(parameter_groups(other), lr=0.1, betas=[0.9, 0.99], weight_decay=0.0)
    assert restore(path, cfg, other, same, Position(CPU)) == []
    assert all(same.state[p]["step"].dtype == torch.float32 for p in other.parameters())
    assert steps(other, same, seed=9) == steps(model, optimizer, seed=9)


def test_the_state_is_laid_out_as_its_parameter(cfg):
    """The published code's momentum is contiguous, our convolutions are not; the fused kernel walks raw memory."""

    def convolution(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten())
        return layers.to(memory_format=torch.channels_last)

    model = convolution(0)
    optimizer = optimizer_of(model)
    steps(model, optimizer, seed=1)
    path = as_published(saved(cfg, (model, optimizer)))
    other = convolution(1)
    another = optimizer_of(other)
    assert restore(path, cfg, other, another, Position(CPU)) == []
    assert steps(other, another, seed=2) == steps(model, optimizer, seed=2)
    for (_, got), (_, want) in zip(other.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(got, want)


def test_saving_leaves_the_optimizer_as_it_is(cfg, trained, monkeypatch):
    """Of a sharded head the first process gathers all rows, the others get nothing; each trains on with its own."""
    model, optimizer = trained
    model.desc_cls = CosineHead(3, 4, scale=1.0)
    optimizer.add_param_group({"params": [("desc_cls.weight", model.desc_cls.weight)]})
    optimizer.state[model.desc_cls.weight]["momentum_buffer"] = torch.ones(4, 3)
    before = {id(p): dict(entry) for p, entry in optimizer.state.items()}
    monkeypatch.setattr(model.desc_cls, "gather", lambda rows: None)
    content = state_of(cfg, model, optimizer, at(1))
    assert content["optimizer_state"]["state"][6] == {"momentum_buffer": None}
    assert content["model_state"]["desc_cls.weight"] is None
    for p, entry in optimizer.state.items():
        assert all(value is before[id(p)][name] for name, value in entry.items())


def test_a_changed_setting_that_only_a_beginning_run_reads_is_not_said_to_count(cfg, trained, tmp_path):
    path = saved(cfg, trained)
    more = ["TRAIN.WEIGHTS", "x.pyth", "MODEL.GEM.P", "4", "OPTIM.BASE_LR", "0.25", "TRAIN.BATCH_SIZE", "12"]
    now = load_cfg(None, ["OUT_DIR", str(tmp_path), *more, "RNG_SEED", "3"])
    assert restore(path, now, *trained, Position(CPU)) == [
        "not used, since a run goes on: MODEL.GEM.P 4.0, TRAIN.WEIGHTS x.pyth (name another OUT_DIR to begin with it)",
        "settings changed since model_epoch_0001.pyth was written: RNG_SEED 1 -> 3",
    ]


def test_the_best_is_looked_for_anew_where_another_score_decides(cfg, trained, tmp_path):
    """A negative error in percent before, an mAP now."""
    path = saved(cfg, trained, at(2))
    same = ["OPTIM.BASE_LR", "0.25", "TRAIN.BATCH_SIZE", "12"]
    now = load_cfg(None, ["OUT_DIR", str(tmp_path), *same, "TEST.RETRIEVAL", "['toy']"])
    position = Position(CPU)
    assert "TEST.RETRIEVAL has changed: the best" in restore(path, now, *trained, position)[0]
    assert position.best_score == -math.inf and position.lowest_error == 12.5


# ---------------------------------------------------------------------------------- content of other kinds and types

ODD = [
    None,
    True,
    -1,
    -0.5,
    2**70,
    10**5000,
    math.nan,
    math.inf,
    "odd\x1b[2J\nname",
    b"bytes",
    [],
    {},
    [None],
    [[[]]],
    {10**5000: "x"},
    {"a": torch.zeros(2)},
    torch.zeros(0),
    torch.zeros(()),
    torch.full((4, 3), math.nan),
    torch.full((4, 3), 1e300, dtype=torch.float64),
    torch.zeros(4, 3, dtype=torch.int64),
    torch.zeros(4, 3, dtype=torch.complex64),
    torch.zeros(4, 3).to_sparse(),
    torch.empty(4, 3, device="meta"),
    torch.zeros(1).expand(1 << 40),
]


def places(content: object, where: tuple = ()) -> Iterator[tuple]:
    """The way to every entry of a nested content."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield (*where, key)
        yield from places(value, (*where, key))


def changed_at(content: object, where: tuple, value: object) -> object:
    """A copy with another value at a place; without the entry where that is `places`."""
    if not where:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    if len(where) == 1 and value is places:
        del copy[where[0]]
    else:
        copy[where[0]] = changed_at(content[where[0]], where[1:], value)
    return copy


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_content_of_any_other_kind_is_refused_by_its_key_or_does_no_harm(cfg, monkeypatch, kind):
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    groups = [{"params": list(model.named_parameters())}]
    if kind == "sgd":
        optimizer = build_sgd(groups, lr=0.1, momentum=0.9, dampening=0.0, nesterov=True, weight_decay=0.0)
    else:
        optimizer = build_adamw(groups, lr=0.1, betas=[0.9, 0.99], weight_decay=0.0)
    steps(model, optimizer, seed=1)
    average, scaler = MovingAverage(model, 0.5), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    own = {"average": average.network, "lists": {"training": "ab"}}
    content = state_of(cfg, model, optimizer, at(2, 3), **own, scaler=scaler.state_dict()) | {"cfg": ""}
    content = copy.deepcopy(content)
    path = checkpoint_path(cfg.OUT_DIR, 2, 3)
    refused = 0
    looked_at = {"optimizer_state": content["optimizer_state"]}
    if kind == "adamw":  # the rest is the same for both
        looked_at |= {key: content[key] for key in ("epoch", "iteration", "run")} | {"ema_state": {}}
    for where in places(looked_at):
        if "param_groups" in where and where[3:4] not in ((), ("params",), ("param_names",)):
            continue  # settings, which are those of the configuration
        for value in (places, *ODD):
            changed = changed_at(content, where, value)
            monkeypatch.setattr("core.checkpoints.resume.read_checkpoint", lambda path, changed=changed: changed)
            position = Position(CPU)
            try:
                notes = restore(path, cfg, model, optimizer, position, scaler=scaler, **own)
            except ValueError as error:
                message = str(error)
                assert message.startswith(f"{path}") and message.isprintable() and len(message) < 500, message
                assert where[0] in message and (where[0] != "run" or len(where) == 1 or where[1] in message), message
                refused += 1
                continue
            assert all(note.isprintable() for note in notes)
            assert all(math.isfinite(loss) for loss in steps(model, optimizer, seed=2, count=1))
            assert position.epochs_done >= 0 and position.iteration >= 0 and scaler.get_scale() >= 0
            assert not math.isnan(position.best_score)
    assert refused > (200 if kind == "sgd" else 500)
