"""Saving changes nothing, whatever is switched on: a run that saves everywhere ends bit by bit as one that never does,
and so does one that goes on from what was saved."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from core import trainer
from core.checkpoints.checkpoint import checkpoint_path, checkpoints, write_checkpoint
from core.checkpoints.resume import state_of
from core.config import load_cfg
from core.logging import setup_logging
from core.processes.faults import Faults
from core.processes.interrupt import Interrupted
from core.step import TrainStep
from tests.core.checkpoints.test_exact_resume import differences
from tests.small_run import FORKING_DDP, SMALL_MODEL, SMALL_TRAINING, free_port, landmarks, overrides, script, start

# Two epochs of two iterations; the rate falls within an epoch, so that each step is another one.
SHORT = {"OPTIM.MAX_EPOCH": 2, "OPTIM.LR_PER_ITER": True, "TEST.SPLIT": ""}
NEVER = {"TRAIN.CHECKPOINT_PERIOD": 2}  # but for the end, which is compared
ALWAYS = {"TRAIN.CHECKPOINT_ITERS": 1, "TRAIN.KEEP_CHECKPOINTS": 9}
STATISTICS = {"BN.USE_PRECISE_STATS": True, "BN.NUM_SAMPLES_PRECISE": 8}
OPTIONS = {
    "adamw-bf16": {
        "OPTIM.OPTIMIZER": "adamw",
        "OPTIM.BASE_LR": 0.001,
        "TRAIN.PRECISION": "bf16",
        "TRAIN.ACCUM_STEPS": 2,
        "TRAIN.FREEZE_AT": 2,
        "OPTIM.CLIP_GRAD": 0.5,
        "OPTIM.HEAD_LR_MULT": 10.0,
        "OPTIM.EMA_DECAY": 0.9,
        **STATISTICS,
    },
    "sgd-fp16": {
        "TRAIN.PRECISION": "fp16",
        "BN.USE_CUSTOM_WEIGHT_DECAY": True,
        "TRAIN.FREEZE_BN": True,
        "OPTIM.NESTEROV": False,
        "OPTIM.DAMPENING": 0.1,
        "OPTIM.CLIP_GRAD": 1.0,
        "MODEL.GEM.TRAINABLE": False,
        "MODEL.HEADS.CLS_LAYER": "curricularface",
        "TRAIN.SAMPLING": "class_balanced",
    },
    "adamw-fp16": {
        "OPTIM.OPTIMIZER": "adamw",
        "OPTIM.BASE_LR": 0.001,
        "TRAIN.PRECISION": "fp16",
        "TRAIN.ACCUM_STEPS": 2,
        "MODEL.FUSION": "global",
        "MODEL.HEADS.IN_FEAT": 2048,
        "MODEL.HEADS.CLS_LAYER": "cosine",
        "OPTIM.LR_POLICY": "exp",
    },
    "sgd-tf32": {
        "TRAIN.PRECISION": "tf32",
        "MODEL.WITH_MA": True,
        "DATA_LOADER.MODE": "fast",
        "OPTIM.EMA_DECAY": 0.5,
        "OPTIM.HEAD_LR_MULT": 0.1,
        "OPTIM.LR_POLICY": "steps",
        "OPTIM.STEPS": "[0,1]",
        "OPTIM.WARMUP_EPOCHS": 1,
        "BN.ZERO_INIT_FINAL_GAMMA": True,
    },
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return landmarks(tmp_path_factory.mktemp("data"), train=8)


@pytest.fixture(autouse=True)
def to_the_point(monkeypatch):
    """The report at the start takes as long as a step."""
    monkeypatch.setattr(trainer.Run, "report", lambda self: [])
    yield
    setup_logging(None, quiet=True)


def settings(data_dir: Path, out_dir: Path, *more: dict) -> list[str]:
    place = {"DATA_LOADER.DATA_DIR": data_dir, "OUT_DIR": out_dir, "LOG_DEST": "file"}
    return overrides(SMALL_MODEL, SMALL_TRAINING, SHORT, place, *more)


def content(out_dir: Path, *place: int) -> dict:
    return torch.load(checkpoint_path(out_dir, *(place or (2,))), weights_only=True)


def copy_checkpoint(source: Path, out_dir: Path, *place: int) -> None:
    path = checkpoint_path(out_dir, *place)
    path.parent.mkdir(parents=True)
    shutil.copy(checkpoint_path(source, *place), path)


def poison_fresh_memory(monkeypatch) -> None:
    """What torch's optimisers allocate without setting it holds a large number."""
    monkeypatch.setattr("torch.empty_like", lambda tensor, **how: torch.full_like(tensor, 1e30, **how))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_that_saves_ends_as_one_that_does_not(data_dir, tmp_path, monkeypatch, options):
    never, always, resumed = tmp_path / "never", tmp_path / "always", tmp_path / "resumed"
    poison_fresh_memory(monkeypatch)
    if options.get("TRAIN.PRECISION") == "fp16":
        overflow_at_first(monkeypatch)
    trainer.train(load_cfg(None, settings(data_dir, never, options, NEVER)))
    trainer.train(load_cfg(None, settings(data_dir, always, options, ALWAYS)))
    assert len(list((always / "checkpoints").glob("model_epoch_*"))) == 4
    assert differences(content(always), content(never)) == []
    copy_checkpoint(always, resumed, 0, 1)
    trainer.train(load_cfg(None, settings(data_dir, resumed, options, NEVER)))
    assert differences(content(resumed), content(never)) == []
    moved = content(never)["optimizer_state"]["state"].values()
    assert all(v.isfinite().all() and v.abs().max() < 1e6 for entry in moved for v in entry.values())


def test_a_larger_batch_inside_an_epoch_leaves_no_checkpoint_that_counts_as_newer(data_dir, tmp_path, monkeypatch):
    """The 3 iterations of 2 images that are done become 1 of 4 images."""

    def stopped_after(iterations: int, **more) -> list[str]:
        polls = iter([None] * iterations + [Interrupted(15)])

        def poll(self):
            if error := next(polls):
                raise error

        monkeypatch.setattr(Faults, "poll", poll)
        cfg = load_cfg(None, settings(data_dir, tmp_path, {"TRAIN.KEEP_CHECKPOINTS": 1, **more}))
        with pytest.raises(SystemExit):
            trainer.train(cfg)
        return [path.name for path in checkpoints(tmp_path)]

    assert stopped_after(3, **{"TRAIN.BATCH_SIZE": 2}) == ["model_epoch_0000_iter_000003.pyth"]
    assert stopped_after(0, **{"TRAIN.BATCH_SIZE": 4}) == ["model_epoch_0000_iter_000001.pyth"]


def overflow_at_first(monkeypatch) -> None:
    """Let the first update of a run overflow, as that of a real network does with the scaler's first factor."""
    real = TrainStep.__call__

    def step(self, images, labels, *, number, rank):
        factor = torch.inf if number == 1 else 1.0
        hook = self.parameters[-1].register_hook(lambda gradient: gradient * factor)
        result = real(self, images, labels, number=number, rank=rank)
        hook.remove()
        return result

    monkeypatch.setattr(TrainStep, "__call__", step)


FREEZING = {"TRAIN.FREEZE_AT": 5, "TRAIN.FREEZE_BN": True, "MODEL.GEM.TRAINABLE": False, "OPTIM.MAX_EPOCH": 1}
CHANGED = {"OPTIM.HEAD_LR_MULT": 3.0, "BN.USE_CUSTOM_WEIGHT_DECAY": True, "OPTIM.EMA_DECAY": 0.5}


def test_freezing_first_and_changing_settings_afterwards(data_dir, tmp_path):
    """One run: the head alone, then everything in other groups, then frozen again with another optimizer."""
    out_dir = tmp_path / "out"
    trainer.train(load_cfg(None, settings(data_dir, out_dir, FREEZING)))
    first = torch.load(checkpoint_path(out_dir, 1), weights_only=True)
    trainer.train(load_cfg(None, settings(data_dir, out_dir, CHANGED)))
    log = (out_dir / "stdout.log").read_text()
    assert re.search(r"no optimizer state for globalmodel\.stem\..* and \d+ more: it begins at zero there", log)
    assert "TRAIN.FREEZE_AT 5 -> 0" in log and "MODEL.GEM.TRAINABLE False -> True" in log
    second = content(out_dir)
    assert second["model_state"].keys() == first["model_state"].keys()
    assert len(second["optimizer_state"]["state"]) > len(first["optimizer_state"]["state"])
    third = {"OPTIM.OPTIMIZER": "adamw", "OPTIM.MAX_EPOCH": 3, "TRAIN.FREEZE_AT": 3}
    trainer.train(load_cfg(None, settings(data_dir, out_dir, third)))
    log = (out_dir / "stdout.log").read_text()
    assert "OPTIM.OPTIMIZER was sgd: adamw begins without" in log
    assert torch.load(checkpoint_path(out_dir, 3), weights_only=True)["epoch"] == 2


def as_published(path: Path, **replaced: object) -> None:
    """Without names, `run` or our own settings, and with contiguous momentum: as the published code writes it."""
    old = torch.load(path, weights_only=True)
    for entry in old["optimizer_state"]["state"].values():
        entry.update({name: value.contiguous() for name, value in entry.items()})
    for group in old["optimizer_state"]["param_groups"]:
        del group["param_names"]
    kept = ("epoch", "model_state", "optimizer_state", "cfg")
    torch.save({key: old[key] for key in kept} | replaced, path)


@pytest.mark.parametrize("decay", [False, True], ids=["one group", "decay of batch norm"])
def test_a_published_checkpoint_goes_on_as_the_same_run(data_dir, tmp_path, decay):
    """Its optimizer numbers the parameters, batch norm's first where that has a decay of its own."""
    own = {"BN.USE_CUSTOM_WEIGHT_DECAY": decay}
    whole, other = tmp_path / "whole", tmp_path / "other"
    trainer.train(load_cfg(None, settings(data_dir, whole, own)))
    copy_checkpoint(whole, other, 1)
    as_published(checkpoint_path(other, 1))
    # Here in other groups, with settings that make the same updates: the numbers of the file are not ours.
    here = {"BN.USE_CUSTOM_WEIGHT_DECAY": True, "BN.CUSTOM_WEIGHT_DECAY": 0.0 if decay else 5e-4}
    trainer.train(load_cfg(None, settings(data_dir, other, here)))
    a, b = content(whole), content(other)
    assert differences(a["model_state"], b["model_state"]) == []


def test_numbers_without_names_are_those_of_the_settings_they_were_written_with(data_dir, tmp_path):
    """As our own checkpoints were before they held names: of frozen parts there is nothing to number."""
    then = {"TRAIN.FREEZE_AT": 2, "MODEL.GEM.TRAINABLE": False, "OPTIM.HEAD_LR_MULT": 10.0}
    cfg = load_cfg(None, settings(data_dir, tmp_path, then, {"BN.USE_CUSTOM_WEIGHT_DECAY": True}))
    before, now = (trainer.Run(c, torch.device("cpu")) for c in (cfg, load_cfg(None, settings(data_dir, tmp_path))))
    for entry in before.optimizer.state.values():
        entry["momentum_buffer"].normal_()
    before.position.epochs_done = 1
    path = checkpoint_path(tmp_path, 1)
    write_checkpoint(state_of(cfg, before.model, before.optimizer, before.position), path)
    as_published(path)
    old = torch.load(path, weights_only=True)
    old["optimizer_state"]["param_groups"].insert(0, {"params": []})  # of batch norm, where all of it was frozen
    torch.save(old, path)
    now.resume(path)
    parameters = dict(before.model.named_parameters())
    for name, parameter in now.model.named_parameters():
        there = before.optimizer.state.get(parameters[name], {}).get("momentum_buffer", torch.zeros(()))
        assert torch.equal(now.optimizer.state[parameter]["momentum_buffer"], there.expand_as(parameter)), name
    torch.save({**torch.load(path, weights_only=True), "iteration": 3}, path)
    with pytest.raises(ValueError, match=r"model_epoch_0001\.pyth: iteration 3 of an epoch that has 2$"):
        now.resume(path)


# Four runs one after the other, each by both processes.
SHARDED = """
import shutil, sys
from core import trainer
from core.checkpoints.checkpoint import checkpoint_path
from core.config import load_cfg
from core.processes.distributed import barrier, is_main
from core.base.errors import entry_point
from core.processes.launch import spawn

ALWAYS = "TRAIN.CHECKPOINT_ITERS 1 TRAIN.KEEP_CHECKPOINTS 9"
RUNS = {
    "whole": ALWAYS,
    "never": "MODEL.HEADS.SHARDED True",
    "always": "MODEL.HEADS.SHARDED True " + ALWAYS,
}

def train(cfg, name, settings):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["OUT_DIR", cfg.OUT_DIR + "/" + name, *settings.split()])
    cfg.freeze()
    trainer.train(cfg)
    barrier()

def work(cfg):
    trainer.Run.report = lambda self: []
    for name, settings in RUNS.items():
        train(cfg, name, settings)
    source, target = (checkpoint_path(cfg.OUT_DIR + "/" + name, 0, 1) for name in ("always", "resumed"))
    if is_main():
        target.parent.mkdir(parents=True)
        shutil.copy(source, target)
    barrier()
    train(cfg, "resumed", RUNS["never"])

@entry_point
def main():
    spawn(work, load_cfg(None, sys.argv[1:]), 2)

if __name__ == "__main__":
    main()
"""


def test_two_processes_with_a_sharded_head(data_dir, tmp_path):
    """They go on after a save, as runs that never saved; come near a head in one piece; and go on as one process."""
    more = {"PORT": free_port(), "TRAIN.CHECKPOINT_PERIOD": 2, "OPTIM.BASE_LR": 1e-3, "OPTIM.CLIP_GRAD": 0.5}
    more |= {"MODEL.HEADS.CLS_LAYER": "curricularface", "OPTIM.EMA_DECAY": 0.5, "OPTIM.HEAD_LR_MULT": 2.0}
    process = start(script(tmp_path, FORKING_DDP + SHARDED), *settings(data_dir, tmp_path, more))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    never, always, resumed = (content(tmp_path / name) for name in ("never", "always", "resumed"))
    assert differences(always, never) == []
    assert differences(resumed, never) == []
    whole, parts = (content(tmp_path / name, 0, 1) for name in ("whole", "always"))
    for key in ("model_state", "ema_state"):
        assert parts[key]["desc_cls.weight"].shape == (3, 8)
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-3, atol=1e-4)
    momenta = [[e["momentum_buffer"] for e in c["optimizer_state"]["state"].values()] for c in (parts, whole)]
    torch.testing.assert_close(*momenta, rtol=1e-2, atol=1e-3)
    trainer.train(load_cfg(None, settings(data_dir, tmp_path / "never", more, {"OPTIM.MAX_EPOCH": 3})))
    assert "2 processes before, 1 now" in (tmp_path / "never" / "stdout.log").read_text()
    assert checkpoint_path(tmp_path / "never", 3).exists()
