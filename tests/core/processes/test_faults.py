"""Broken images that may be replaced, losses that are not finite, and what a run says of itself at the start."""

import datetime
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core import builders
from core.base.errors import is_user_error
from core.base.locks import folder_lock
from core.checkpoints.checkpoint import BEST, checkpoints, find_fault
from core.checkpoints.position import Position
from core.config import load_cfg
from core.logging import read_stats, setup_logging
from core.processes import faults
from core.processes.faults import Faults
from core.processes.interrupt import Failed
from core.summary import count_gflops, rate_warning
from core.trainer import Run, train
from tests.small_run import SMALL_MODEL, SMALL_TRAINING, cut_short, landmarks, overrides

GLOBAL_ONLY = {"MODEL.FUSION": "global"}


@pytest.fixture(autouse=True)
def quiet_afterwards():
    yield
    setup_logging(None, quiet=True)


@pytest.fixture
def data_dir(tmp_path):
    return landmarks(tmp_path / "data", train=12, val=4)


def configured(data_dir: Path, **more):
    place = {"DATA_LOADER.DATA_DIR": data_dir, "OUT_DIR": data_dir.parent / "out", "OPTIM.BASE_LR": 0.001}
    return load_cfg(None, overrides(SMALL_MODEL, SMALL_TRAINING, GLOBAL_ONLY, place, more))


@pytest.mark.parametrize("workers", [0, 2])
def test_as_many_broken_images_as_allowed_are_replaced_listed_and_remembered(data_dir, capsys, workers):
    for name in ("train/03.jpg", "train/07.jpg", "val/01.jpg"):
        cut_short(data_dir / "tiny" / name)
    more = {"DATA_LOADER.SKIP_BROKEN": 3, "OPTIM.MAX_EPOCH": 2, "DATA_LOADER.NUM_WORKERS": workers}
    train(configured(data_dir, **more))
    out = capsys.readouterr().out
    listed = [line.partition("] ")[2] for line in out.splitlines() if "broken image" in line]
    assert [line.partition(", replaced")[0] for line in listed] == [f"broken image {n}" for n in (1, 2, 3)]
    for line, name in (("line 4", "train/03"), ("line 8", "train/07"), ("line 2", "val/01")):
        assert sum(f"{line}: " in entry and f"{name}.jpg: truncated" in entry for entry in listed) == 1
    content = torch.load(checkpoints(data_dir.parent / "out")[-1], weights_only=True)
    assert len(content["run"]["broken"]) == 3
    assert [r["images"] for r in read_stats(out.splitlines()) if r["_type"] == "train_epoch"] == [12, 12]


def test_one_more_than_allowed_ends_the_run_which_goes_on_after_the_mend(data_dir):
    photographs = [data_dir / "tiny" / "train" / f"{name}.jpg" for name in ("03", "07", "08")]
    whole = [path.read_bytes() for path in photographs]
    for path in photographs:
        cut_short(path)
    cfg = configured(data_dir, **{"DATA_LOADER.SKIP_BROKEN": 2, "OPTIM.MAX_EPOCH": 1, "TEST.SPLIT": ""})
    with pytest.raises(ValueError, match=r"^3 broken images, DATA_LOADER\.SKIP_BROKEN is 2; the last is .*truncated"):
        train(cfg)
    for path, content in zip(photographs, whole, strict=True):
        path.write_bytes(content)
    train(cfg)
    assert checkpoints(cfg.OUT_DIR)[-1].name == "model_epoch_0001.pyth"


@pytest.mark.parametrize(("split", "iterations"), [("val", 3), ("train", 2)])
def test_what_was_trained_before_an_image_that_ends_the_run_is_kept(data_dir, split, iterations, capsys):
    """In the evaluation after an epoch and in its third step; after the mend the same command goes on."""
    cfg = configured(data_dir, **{"OPTIM.MAX_EPOCH": 1})
    index = Run(cfg, torch.device("cpu")).train_loader.batch_sampler.order(0)[8] if split == "train" else 2
    path = data_dir / "tiny" / split / f"{index:02d}.jpg"
    whole = path.read_bytes()
    cut_short(path)
    with pytest.raises(ValueError, match=f"{path.name}: truncated") as caught:
        train(cfg)
    assert is_user_error(caught.value)
    assert [path.name for path in checkpoints(cfg.OUT_DIR)] == [f"model_epoch_0000_iter_{iterations:06d}.pyth"]
    path.write_bytes(whole)
    train(cfg)
    assert checkpoints(cfg.OUT_DIR)[-1].name == "model_epoch_0001.pyth"
    records = read_stats(capsys.readouterr().out.splitlines())
    assert [r["iter"] for r in records if r["_type"] == "train_iter"] == ["1/3", "2/3", "3/3"]
    assert [r["images"] for r in records if r["_type"] == "test_epoch"] == [4]


def test_nothing_is_saved_where_nothing_was_trained(data_dir):
    for path in (data_dir / "tiny" / "train").glob("*.jpg"):
        cut_short(path)
    cfg = configured(data_dir)
    with pytest.raises(ValueError, match="truncated"):
        train(cfg)
    assert checkpoints(cfg.OUT_DIR) == []


class Together:
    """Two processes as two threads: counts summed and told one call later, objects gathered."""

    def __init__(self, monkeypatch):
        self.barrier, self.given = threading.Barrier(2, timeout=10), [None, None]
        self.place = threading.local()
        for name, value in (("world_size", lambda: 2), ("gather_objects", self.gather), ("Agreement", self.agreement)):
            monkeypatch.setattr(faults, name, value)

    def gather(self, item):
        self.given[self.place.rank] = item
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def agreement(self, size, *, timeout):
        before = [[0] * size]

        def agree(counts):
            before.append([sum(column) for column in zip(*self.gather(counts), strict=True)])
            return before[-2]

        return agree

    def __call__(self, work) -> list:
        """What `work(faults, rank)` returns or raises in each."""

        def run(rank):
            self.place.rank = rank
            position = Position(torch.device("cpu"))
            watch = Faults(position, None, None, skip_broken=0, remember=1, timeout=datetime.timedelta(seconds=9))
            try:
                return work(watch, rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(run, range(2)))


@pytest.mark.parametrize("bad", [0, 1, 2, 4])
def test_all_processes_end_before_the_same_step_where_a_batch_of_one_cannot_be_made(monkeypatch, bad):
    together, steps = Together(monkeypatch), [0, 0]

    def work(watch, rank):
        batches = (1 // (number - bad if rank else 1) for number in range(5))
        for _ in watch.watched(batches):
            watch.poll()
            together.gather("a step")
            steps[rank] += 1

    first, second = together(work)
    assert type(first) is type(second) is Failed
    assert isinstance(second.error, ZeroDivisionError)
    assert str(first.error).startswith("process 1 of the run cannot go on: integer division")
    assert steps == [bad if bad > 1 else 0] * 2


@pytest.mark.parametrize("bad", [0, 1, 2, None])
def test_all_processes_end_where_one_fails_in_an_evaluation(monkeypatch, bad):
    def work(watch, rank):
        with watch.shared():
            for number in range(3):
                watch.poll()
                if rank and number == bad:
                    raise ValueError("no such image")
        return Together.gather(together, "sums")

    together = Together(monkeypatch)
    ended = together(work)
    if bad is None:
        assert ended == [["sums", "sums"]] * 2
    else:
        assert [str(each) for each in ended] == ["process 1 of the run cannot go on: no such image", "no such image"]
        assert all(type(each) is Failed for each in ended)


def test_an_out_dir_in_use_is_refused(data_dir):
    cfg = configured(data_dir)
    with folder_lock(cfg.OUT_DIR), pytest.raises(ValueError, match="is in use by another run"):
        train(cfg)


def test_nothing_good_is_lost_to_a_loss_that_is_not_finite(data_dir):
    """The checkpoints of before stay, and a run goes on from the last of them."""
    more = {"OPTIM.MAX_EPOCH": 2, "TRAIN.CHECKPOINT_ITERS": 1, "TRAIN.KEEP_CHECKPOINTS": 9}
    cfg = configured(data_dir, **more)
    run = Run(cfg, torch.device("cpu"))
    step, calls = type(run.step).__call__, []

    class Poisoned(type(run.step)):
        def __call__(self, images, labels, **place):
            calls.append(1)
            return step(self, images * (torch.nan if len(calls) == 5 else 1.0), labels, **place)

    run.step.__class__ = Poisoned
    setup_logging(None, quiet=True)
    with pytest.raises(FloatingPointError, match="loss of process 0 is not finite at epoch 2, iteration 2"):
        run.train()
    names = [path.name for path in checkpoints(cfg.OUT_DIR)]
    assert names[-1] == "model_epoch_0001_iter_000001.pyth" and len(names) == 4
    assert all(find_fault(path) is None for path in checkpoints(cfg.OUT_DIR))
    train(cfg)
    assert checkpoints(cfg.OUT_DIR)[-1].name == "model_epoch_0002.pyth"


def test_the_best_is_that_of_the_lowest_error(data_dir, monkeypatch):
    errors = iter([50.0, 25.0, 75.0])
    monkeypatch.setattr("core.evaluation.Evaluation.validate", lambda *_: next(errors))
    cfg = configured(data_dir, **{"OPTIM.MAX_EPOCH": 3, "TRAIN.CHECKPOINT_PERIOD": 3})
    train(cfg)
    best = torch.load(Path(cfg.OUT_DIR) / "checkpoints" / BEST, weights_only=True)
    assert (best["epoch"], best["run"]["best_score"]) == (1, -25.0)
    assert [path.name for path in checkpoints(cfg.OUT_DIR)] == ["model_epoch_0003.pyth"]


@pytest.mark.parametrize(
    "more",
    [
        {"DATA_LOADER.MODE": "fast", "TRAIN.SAMPLING": "class_balanced"},
        {"TRAIN.PRECISION": "bf16", "TRAIN.ACCUM_STEPS": 2, "OPTIM.CLIP_GRAD": 1.0},
        {"OPTIM.OPTIMIZER": "adamw", "OPTIM.HEAD_LR_MULT": 2.0, "TRAIN.FREEZE_AT": 3, "TRAIN.FREEZE_BN": True},
        {"TRAIN.PRECISION": "fp16", "OPTIM.EMA_DECAY": 0.9},
    ],
)
def test_a_run_with_options_ends_with_finite_numbers(data_dir, capsys, more):
    cfg = configured(data_dir, **more)
    cfg.defrost()
    cfg.OPTIM.MAX_EPOCH = 1
    before = {key: value.clone() for key, value in Run(cfg, torch.device("cpu")).model.state_dict().items()}
    train(cfg)
    records = read_stats(capsys.readouterr().out.splitlines())
    assert all(record["loss"] is not None for record in records if record["_type"] != "test_epoch")
    state = torch.load(checkpoints(cfg.OUT_DIR)[-1], weights_only=True)["model_state"]
    still = [key for key in before if key.startswith(("globalmodel.stem.", "globalmodel.s1.", "globalmodel.s2."))]
    torch.manual_seed(cfg.RNG_SEED)
    fresh = builders.build_classifier(cfg).state_dict()
    assert all(torch.equal(state[key], fresh[key]) for key in still) == (cfg.TRAIN.FREEZE_AT == 3)
    # The first float16 gradients overflow: they are left out, and the loss is scaled less.
    assert cfg.TRAIN.PRECISION == "fp16" or not torch.equal(state["fc.weight"], fresh["fc.weight"])


def test_validation_is_of_the_moving_average(data_dir, capsys):
    train(configured(data_dir, **{"OPTIM.MAX_EPOCH": 2, "OPTIM.EMA_DECAY": 0.99, "BN.MOM": 0.9}))
    said = [r for r in read_stats(capsys.readouterr().out.splitlines()) if r["_type"] == "test_epoch"][-1]
    content = torch.load(checkpoints(data_dir.parent / "out")[-1], weights_only=True)
    losses = {}
    for name in ("ema_state", "model_state"):
        run = Run(configured(data_dir), torch.device("cpu"))
        run.model.load_state_dict(content[name])
        setup_logging(None)
        run.evaluate(run.evaluated, run.faults)
        (record,) = read_stats(capsys.readouterr().out.splitlines())
        losses[name] = record["loss"]
    assert said["loss"] == losses["ema_state"] != losses["model_state"]


# ------------------------------------------------------------------------------------------- the report at the start


def test_the_operations_of_a_resnet_50_are_those_of_its_paper():
    """He et al., CVPR 2016, table 1: 3.8 billion multiply-adds, with the stride in the 1x1 convolution."""
    cfg = load_cfg(None, ["MODEL.FUSION", "global", "MODEL.HEADS.IN_FEAT", "2048"])
    network = builders.build_descriptor(cfg).eval()
    assert count_gflops(network, 224, "cpu") / 2 == pytest.approx(3.8, abs=0.1)


@pytest.mark.parametrize(("stride_1x1", "size"), [(False, 224), (True, 229)])
def test_operations_are_those_that_torch_counts(stride_1x1, size):
    cfg = load_cfg(None, overrides(SMALL_MODEL, {"MODEL.WITH_MA": True, "RESNET.STRIDE_1X1": stride_1x1}))
    network = builders.build_descriptor(cfg).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size))
    assert count_gflops(network, size, "cpu") == counter.get_total_flops() / 1e9


@pytest.mark.parametrize(
    ("rate", "batch", "warned"), [(0.01, 64, False), (0.05, 128, False), (0.05, 8, True), (0.0001, 128, True)]
)
def test_a_rate_far_from_known_recipes_is_remarked(rate, batch, warned):
    cfg = load_cfg(None, ["OPTIM.BASE_LR", str(rate), "TRAIN.BATCH_SIZE", str(batch)])
    assert bool(rate_warning(cfg)) == warned


def test_the_report_counts_classes(data_dir):
    run = Run(configured(data_dir, **{"MODEL.NUM_CLASSES": 5}), torch.device("cpu"))
    report = "\n".join(run.report())
    assert "images a class: 4 to 4, median 4; 2 of 5 classes without images, 0 with one" in report
    assert "12 images of 3 classes to train, 4 to validate; 3 iterations of 4 images an epoch (4 a process)" in report
    assert "fp32" in report and "1 x CPU" in report
