import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from core import trainer
from core.checkpoints.checkpoint import checkpoint_path, checkpoints
from core.config import load_cfg
from core.evaluation import Evaluation
from core.logging import read_stats, setup_logging
from core.step import TrainStep
from core.trainer import Run, train
from datasets.images.decode import ImageError
from datasets.loader import TrainBatches
from tests.small_run import (
    ROOT,
    SMALL_MODEL,
    SMALL_TRAINING,
    child_environment,
    cut_short,
    landmarks,
    overrides,
    python,
    script,
    start,
)

# The least that has a branch of each kind, without the local one.
GLOBAL_ONLY = {"MODEL.FUSION": "global"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return landmarks(tmp_path_factory.mktemp("data"), train=10, val=5)


@pytest.fixture(autouse=True)
def quiet_afterwards():
    yield
    setup_logging(None, quiet=True)


@pytest.fixture
def configured(data_dir, tmp_path):
    def configured(**more):
        groups = (SMALL_MODEL, SMALL_TRAINING, {"DATA_LOADER.DATA_DIR": data_dir, "OUT_DIR": tmp_path / "out"}, more)
        return load_cfg(None, overrides(*groups))

    return configured


def newest(out_dir: str | Path) -> Path | None:
    """The newest checkpoint, by its name."""
    return (checkpoints(out_dir) or [None])[-1]


def states(path: Path) -> list[torch.Tensor]:
    """Every tensor of a checkpoint: weights, statistics, momenta."""
    content = torch.load(path, weights_only=True)
    momenta = [entry["momentum_buffer"] for entry in content["optimizer_state"]["state"].values()]
    return [*content["model_state"].values(), *momenta]


def test_a_run_from_start_to_end(configured, capsys):
    more = {"OPTIM.MAX_EPOCH": 3, "OPTIM.WARMUP_EPOCHS": 2, "TRAIN.EVAL_PERIOD": 2, "TRAIN.CHECKPOINT_PERIOD": 2}
    cfg = configured(**more, LOG_PERIOD=2)
    train(cfg)
    out, _ = capsys.readouterr()
    records = read_stats(out.splitlines())
    kinds = [(r["_type"], r["epoch"], r.get("iter")) for r in records]
    assert kinds == [
        ("train_iter", "1/3", "2/2"),
        ("train_epoch", "1/3", None),
        ("train_iter", "2/3", "2/2"),
        ("train_epoch", "2/3", None),
        ("test_epoch", "2/3", None),
        ("train_iter", "3/3", "2/2"),
        ("train_epoch", "3/3", None),
        ("test_epoch", "3/3", None),
    ]
    # 0.05 on the cosine, times the warm-up's 0.1 and 0.55
    assert [r["lr"] for r in records if r["_type"] == "train_epoch"] == pytest.approx([0.005, 0.020625, 0.0125])
    assert [r["images"] for r in records] == [8, 8, 8, 8, 5, 8, 8, 5]
    for record in records:
        assert {"loss", "top1_err", "top5_err", "mem"} <= record.keys()
        assert record["loss"] > 0 and 0 <= record["top5_err"] <= record["top1_err"] <= 100 and record["mem"] > 0
        if record["_type"] != "test_epoch":
            assert record["images_per_s"] > 0 and record["time_avg"] > 0 and "eta" in record
    assert records[-1]["min_top1_err"] == min(r["top1_err"] for r in records if r["_type"] == "test_epoch")
    folder = Path(cfg.OUT_DIR)
    assert sorted(path.name for path in folder.rglob("*.*")) == [
        "config.yaml",
        "model_best.pyth",
        "model_epoch_0002.pyth",
        "model_epoch_0003.pyth",
        "stdout.log",
    ]
    assert load_cfg(folder / "config.yaml") == cfg
    content = torch.load(newest(folder), weights_only=True)
    assert content["epoch"] == 2 and all(not key.startswith("module.") for key in content["model_state"])
    assert torch.equal(content["model_state"]["desc_cls.weight"], states(newest(folder))[-1]) is False

    train(cfg)  # once more: there is nothing left to do
    out, _ = capsys.readouterr()
    assert f"resuming from {newest(folder)}: 3 of 3 epochs done" in out
    assert "nothing to train" in out and read_stats(out.splitlines()) == []


def test_the_log_can_go_to_a_file(configured, capsys):
    cfg = configured(**GLOBAL_ONLY, **{"OPTIM.MAX_EPOCH": 1, "LOG_DEST": "file", "TEST.SPLIT": ""})
    train(cfg)
    setup_logging(None, quiet=True)
    assert capsys.readouterr().out == ""
    lines = (Path(cfg.OUT_DIR) / "stdout.log").read_text().splitlines()
    assert [record["_type"] for record in read_stats(lines)] == ["train_iter", "train_iter", "train_epoch"]
    said = "10 images of 3 classes to train, no validation; 2 iterations of 4 images an epoch (4 a process)"
    assert any(said in line for line in lines)


def test_zero_epochs_save_the_untrained_network(configured, capsys):
    cfg = configured(**GLOBAL_ONLY, **{"OPTIM.MAX_EPOCH": 0})
    train(cfg)
    assert newest(cfg.OUT_DIR) == checkpoint_path(cfg.OUT_DIR, 0)
    state = torch.load(checkpoint_path(cfg.OUT_DIR, 0), weights_only=True)["model_state"]
    torch.manual_seed(cfg.RNG_SEED)
    fresh = trainer.builders.build_classifier(cfg).state_dict()
    assert all(torch.equal(state[key], value) for key, value in fresh.items())
    assert "nothing to train" in capsys.readouterr().out


def test_the_seed_decides_the_run(configured, tmp_path):
    more = GLOBAL_ONLY | {"OPTIM.MAX_EPOCH": 1, "TEST.SPLIT": ""}
    paths = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)  # whatever happened before
        cfg = configured(**more, OUT_DIR=tmp_path / str(number), RNG_SEED=seed)
        train(cfg)
        paths.append(newest(cfg.OUT_DIR))
    first, same, other = map(states, paths)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.numel() > 1000)


def test_without_auto_resume_an_out_dir_with_checkpoints_is_refused(configured, tmp_path):
    more = GLOBAL_ONLY | {"OPTIM.MAX_EPOCH": 0, "TRAIN.AUTO_RESUME": False}
    cfg = configured(**more)
    train(cfg)  # the folder is new: nothing to refuse
    before = newest(cfg.OUT_DIR).read_bytes()
    with pytest.raises(
        ValueError, match=r"out holds checkpoints: set TRAIN\.AUTO_RESUME True to go on, or another OUT_DIR"
    ):
        train(cfg)
    assert newest(cfg.OUT_DIR).read_bytes() == before


def test_initial_weights_are_loaded_and_what_they_lack_is_listed(configured, tmp_path, capsys):
    source = configured(**GLOBAL_ONLY, **{"OPTIM.MAX_EPOCH": 0, "OUT_DIR": tmp_path / "source", "MODEL.NUM_CLASSES": 4})
    train(source)
    weights = newest(source.OUT_DIR)
    capsys.readouterr()
    cfg = configured(**GLOBAL_ONLY, **{"OPTIM.MAX_EPOCH": 0, "TRAIN.WEIGHTS": weights, "RNG_SEED": 5})
    train(cfg)
    out = capsys.readouterr().out
    lacking, aside = (line for line in out.splitlines() if f"{weights}: " in line)
    assert "left at their initial values: desc_cls.weight" in lacking
    assert "left aside: desc_cls.weight" in aside and "4 classes" in aside
    old, new = (torch.load(newest(c.OUT_DIR), weights_only=True)["model_state"] for c in (source, cfg))
    assert all(torch.equal(new[key], value) for key, value in old.items() if key != "desc_cls.weight")


def test_resuming_does_not_load_the_initial_weights_again(configured, tmp_path, capsys):
    more = GLOBAL_ONLY | {"TRAIN.WEIGHTS": tmp_path / "gone.pyth"}
    train(configured(**GLOBAL_ONLY, **{"OPTIM.MAX_EPOCH": 0}))
    train(configured(**more, **{"OPTIM.MAX_EPOCH": 0}))
    assert "resuming from" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(configured):
    cfg = configured(**GLOBAL_ONLY, **{"OPTIM.BASE_LR": 1e30, "OPTIM.MAX_EPOCH": 2})
    with pytest.raises(FloatingPointError, match=r"^the loss of process 0 is not finite at epoch 1, iteration 2") as e:
        train(cfg)
    batches = TrainBatches(10, batch_size=4, seed=cfg.RNG_SEED)
    second = list(batches)[1]
    assert re.findall(r"train/(\d+)\.jpg", str(e.value)) == [f"{index:02d}" for _, index in second]
    assert newest(cfg.OUT_DIR) is None


def test_weights_ruined_by_the_last_step_are_not_saved(configured):
    """Loading would refuse them, and the run could never go on."""
    one_step = {"OPTIM.BASE_LR": 1e38, "OPTIM.WEIGHT_DECAY": 1e4, "OPTIM.MAX_EPOCH": 1, "TRAIN.BATCH_SIZE": 10}
    cfg = configured(**GLOBAL_ONLY, **one_step)
    with pytest.raises(FloatingPointError, match=r" is not finite after epoch 1: lower OPTIM\.BASE_LR"):
        train(cfg)
    assert newest(cfg.OUT_DIR) is None


def test_a_validation_that_overflows_is_logged_and_ends_nothing(configured, capsys):
    torch.manual_seed(0)
    run = Run(configured(**GLOBAL_ONLY), torch.device("cpu"))
    run.model.fc.weight.data.fill_(torch.inf)
    setup_logging(None)
    run.evaluate.validate(run.evaluated.eval(), run.faults)
    (record,) = read_stats(capsys.readouterr().out.splitlines())
    assert record["loss"] is None and record["images"] == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_names_file_list_and_line(configured, tmp_path, workers):
    data_dir = landmarks(tmp_path / "data", train=8, val=2)
    cut_short(data_dir / "tiny" / "train" / "05.jpg")
    more = {"DATA_LOADER.DATA_DIR": data_dir, "DATA_LOADER.NUM_WORKERS": workers}
    with pytest.raises(ImageError, match=r"train_list\.txt, line 6: .*train/05\.jpg: truncated"):
        train(configured(**GLOBAL_ONLY, **more))


def test_every_epoch_has_its_own_order_and_augmentation(configured, monkeypatch):
    cfg = configured(**GLOBAL_ONLY, **{"OPTIM.MAX_EPOCH": 3, "TEST.SPLIT": "", "TRAIN.CHECKPOINT_PERIOD": 3})
    seen = []

    def record(self, images, labels, **place):
        seen.append(images.contiguous())
        return torch.tensor(1.0), torch.zeros(len(labels), dtype=torch.long)

    monkeypatch.setattr(TrainStep, "__call__", record)
    train(cfg)
    expected = []
    loader = trainer.builders.build_train_loader(cfg)
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        expected += [batch.images.contiguous() for batch in loader]
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert len({images.sum().item() for images in seen}) == 6


def test_validation_uses_plain_cosines_over_each_image_once(configured, capsys):
    """Against descriptors and cosines computed one image at a time, without margin."""
    cfg = configured(**GLOBAL_ONLY, **{"MODEL.HEADS.MARGIN": 0.5})
    torch.manual_seed(3)
    run = Run(cfg, torch.device("cpu"))
    setup_logging(None)
    assert run.evaluate(run.evaluated, run.faults)
    (record,) = read_stats(capsys.readouterr().out.splitlines())
    model, dataset = run.model.eval(), run.evaluate.loader.dataset
    losses, wrong = [], 0
    with torch.no_grad():
        for index in range(len(dataset)):
            sample = dataset[index]
            label = int(sample.labels[0])
            descriptor = model.descriptors(torch.as_tensor(sample.images).permute(0, 3, 1, 2))[0]
            weights = model.desc_cls.weight
            cosines = weights @ descriptor / weights.norm(dim=1) / descriptor.norm()
            losses.append(torch.logsumexp(30 * cosines, 0) - 30 * cosines[label])
            wrong += int(cosines.argmax()) != label
    assert record["images"] == 5
    assert record["loss"] == pytest.approx(sum(losses).item() / 5, rel=1e-4)
    assert record["top1_err"] == pytest.approx(100 * wrong / 5) and record["top5_err"] == 0


def test_precise_statistics_are_what_is_evaluated_and_saved(configured, monkeypatch):
    calls = []

    def precise(model, loader, *, batches, **more):
        calls.append((model.training, batches, len(loader)))

    def train_epoch(self):
        self.position.iteration = self.iterations
        self.train_loader.batch_sampler.set_epoch(0, start=1)  # as after going on inside an epoch

    monkeypatch.setattr(trainer, "update_precise_bn", precise)
    periods = {"TRAIN.EVAL_PERIOD": 2, "TRAIN.CHECKPOINT_PERIOD": 3, "OPTIM.MAX_EPOCH": 5}
    settings = {"BN.USE_PRECISE_STATS": True, "BN.NUM_SAMPLES_PRECISE": 9, "TEST.SPLIT": ""}
    cfg = configured(**GLOBAL_ONLY, **periods, **settings)
    monkeypatch.setattr(Run, "train_epoch", train_epoch)
    monkeypatch.setattr(
        Evaluation, "__call__", lambda self, *_: calls.append(("evaluate", self.position.epochs_done + 1))
    )
    monkeypatch.setattr(Run, "save", lambda self, best: calls.append(("save", self.position.epochs_done)))
    train(cfg)
    precise = (True, 9 // 4, 2)  # training mode, batches, of the whole epoch
    assert calls == [
        *(precise, ("evaluate", 2), precise, ("save", 3)),
        *(precise, ("evaluate", 4), precise, ("evaluate", 5), ("save", 5)),
    ]


def test_a_run_killed_after_an_epoch_goes_on_to_the_same_weights_bit_by_bit(data_dir, tmp_path):
    """Real processes: one runs through, the other is killed when its first checkpoint is there, and started again."""
    more = {"OPTIM.MAX_EPOCH": 3, "OPTIM.WARMUP_EPOCHS": 1, "MODEL.HEADS.CLS_LAYER": "curricularface"}
    (tmp_path / "empty.yaml").touch()

    def command(out_dir: str, workers: int) -> list[str]:
        place = {"DATA_LOADER.DATA_DIR": data_dir, "OUT_DIR": tmp_path / out_dir, "DATA_LOADER.NUM_WORKERS": workers}
        args = overrides(SMALL_MODEL, SMALL_TRAINING, more, place)
        return [str(ROOT / "train.py"), "--cfg", str(tmp_path / "empty.yaml"), *args]

    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": child_environment(), "cwd": tmp_path}
    whole = subprocess.Popen([sys.executable, *command("whole", 0)], **pipes)
    killed = subprocess.Popen([sys.executable, *command("killed", 1)], **pipes)
    deadline = time.monotonic() + 200
    while newest(tmp_path / "killed") is None and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = newest(tmp_path / "killed")
    assert done.name in ("model_epoch_0001.pyth", "model_epoch_0002.pyth")  # not the last: there was work left
    ended = python(*command("killed", 0), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"resuming from {done}: {int(done.stem[-4:])} of 3 epochs done" in ended.stdout
    first_epoch = read_stats(ended.stdout.splitlines())[0]["epoch"]
    assert first_epoch == f"{int(done.stem[-4:]) + 1}/3"
    assert whole.wait(timeout=200) == 0
    last = [checkpoint_path(tmp_path / folder, 3) for folder in ("whole", "killed")]
    for a, b in zip(*map(states, last), strict=True):
        assert torch.equal(a, b)
    assert len(states(last[0])) > 300


WITHOUT_COMPILER = """
import sys
from core.config import load_cfg
from core.trainer import train
for epochs in "1", "2":
    train(load_cfg(None, [*sys.argv[1:], "OPTIM.MAX_EPOCH", epochs]))
print(sorted(set(sys.modules) & {"torch._dynamo", "sympy", "scipy"}))
"""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_and_its_resumption_load_no_compiler(data_dir, tmp_path, optimizer):
    """Of torch, see `core.optimizer` and `core.summary`: it would take longer than all the rest of the start."""
    place = {"DATA_LOADER.DATA_DIR": data_dir, "OUT_DIR": tmp_path / "out", "OPTIM.OPTIMIZER": optimizer}
    run = start(script(tmp_path, WITHOUT_COMPILER), *overrides(SMALL_MODEL, SMALL_TRAINING, GLOBAL_ONLY, place))
    output, errors = run.communicate(timeout=200)
    assert output.splitlines()[-1:] == ["[]"], errors
