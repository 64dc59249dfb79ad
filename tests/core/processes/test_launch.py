"""Processes started by this one, in several kinds of trouble: real processes, real signals."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from core.checkpoints.checkpoint import checkpoints
from core.config import load_cfg
from core.processes import launch
from datasets.loader import TrainBatches
from tests.small_run import (
    FORKING,
    ROOT,
    SMALL_MODEL,
    SMALL_TRAINING,
    cut_short,
    free_port,
    landmarks,
    messages,
    overrides,
    python,
    script,
    start,
)

DIES_ONCE = """
import os, signal, sys
from core import builders
from core.config import load_cfg
from core.processes.launch import launch, restarts
from core.step import TrainStep
from core.trainer import train

builders.DistributedDataParallel = lambda model, **more: model  # it would load torch's compiler four times
real = TrainStep.__call__
def step(self, *batch, number, rank):
    if (number, rank, restarts()) == (5, 1, 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *batch, number=number, rank=rank)
TrainStep.__call__ = step
launch(train, load_cfg(None, sys.argv[1:]))
"""

EPOCHS = ("OPTIM.MAX_EPOCH", "1")

TROUBLE = """
import os, signal, sys, time
from core import builders
from core.config import load_cfg
from core.processes.distributed import all_reduce_sum, barrier, rank
from core.base.errors import entry_point
from core.processes.launch import spawn
from core.checkpoints.output import output_folder
from core.step import TrainStep
from core.trainer import train

def killed(cfg):
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier()

def broken(cfg):
    if rank() == 1:
        raise RuntimeError("a defect of ours")
    barrier()
    time.sleep(300)

def hanging(cfg):
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    barrier()

def poisoned(cfg):
    real = TrainStep.__call__
    def step(self, images, labels, *, number, rank):
        factor = float("nan") if (rank, number) == (1, 2) else 1.0
        return real(self, images * factor, labels, number=number, rank=rank)
    TrainStep.__call__ = step
    builders.DistributedDataParallel = lambda model, **more: model  # it would load torch's compiler first
    train(cfg)

def waiting(cfg):
    os.write(1, bytes(str(os.getpid()) + chr(10), "ascii"))  # in one piece
    time.sleep(300)

@entry_point
def main():
    cfg = load_cfg(None, sys.argv[2:])
    with output_folder(cfg):
        spawn(globals()[sys.argv[1]], cfg, 2)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return landmarks(tmp_path_factory.mktemp("data"), train=12, val=5)


def settings(data_dir: Path, **more) -> list[str]:
    return overrides(SMALL_MODEL, SMALL_TRAINING, {"DATA_LOADER.DATA_DIR": data_dir}, more)


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        ("killed", 1, ["error: process 1 of the run was ended by SIGKILL"]),
        ("hanging", 1, None),
        ("broken", 1, None),
        ("train", 2, "truncated"),
    ],
)
def test_a_process_that_fails_ends_the_run_in_bounded_time(data_dir, tmp_path, trouble, code, said):
    if trouble == "train":  # one photograph of the second process's share is damaged
        data_dir = landmarks(tmp_path / "data", train=12, val=0)
        second = next(iter(TrainBatches(12, batch_size=4, seed=1, rank=1, world=2)))
        cut_short(data_dir / "tiny" / "train" / f"{second[0][1]:02d}.jpg")
    more = {"OUT_DIR": tmp_path / "made" / "out", "PORT": free_port(), "TEST.SPLIT": "", "LOG_DEST": "file"}
    more["DIST_TIMEOUT"] = 5 if trouble == "hanging" else 30  # it holds for finding each other, too
    began = time.monotonic()
    source = TROUBLE if trouble == "train" else FORKING + TROUBLE  # one of them as in use: spawned
    process = start(script(tmp_path, source), trouble, *settings(data_dir, **more))
    _, err = process.communicate(timeout=150)
    assert time.monotonic() - began < 60
    assert process.returncode == code
    assert not (tmp_path / "made").exists()
    if trouble == "broken":
        assert "RuntimeError: a defect of ours" in err and "Traceback" in err
    elif trouble == "hanging":
        [line] = messages(err)
        assert line.startswith("error: process 1 of the run did not answer any more and was ended: process 0"), err
    elif trouble == "train":
        [line] = messages(err) if len(messages(err)) == 1 else pytest.fail(err)
        assert line.startswith("error: ") and f"{second[0][1]:02d}.jpg" in line and said in line
    else:
        assert messages(err) == said


def test_a_loss_that_is_not_finite_names_process_iteration_and_images(data_dir, tmp_path):
    more = {"OUT_DIR": tmp_path / "out", "PORT": free_port(), "TEST.SPLIT": "", "OPTIM.BASE_LR": 0.001}
    process = start(script(tmp_path, FORKING + TROUBLE), "poisoned", *settings(data_dir, **more))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    [line] = messages(err)
    assert line.startswith("error: the loss of process 1 is not finite at epoch 1, iteration 2; the run ends before")
    second = list(TrainBatches(12, batch_size=4, seed=1, rank=1, world=2))[1]
    assert re.findall(r"train/(\d+)\.jpg", line) == [f"{index:02d}" for _, index in second]
    assert not checkpoints(tmp_path / "out")  # the log stays


def test_torchrun_starts_the_processes_again_and_they_go_on(data_dir, tmp_path, monkeypatch):
    """Also without AUTO_RESUME, which is about an OUT_DIR that another run has left."""
    more = {"OUT_DIR": tmp_path / "out", "OPTIM.MAX_EPOCH": 2, "OPTIM.BASE_LR": 0.001, "LOG_DEST": "file"}
    more |= {"MODEL.FUSION": "global"}
    args = settings(data_dir, **more, **{"TRAIN.AUTO_RESUME": False, "TEST.SPLIT": ""})
    path = script(tmp_path, DIES_ONCE)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", str(path)]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ended = python(*command, *args, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    log = (tmp_path / "out" / "stdout.log").read_text()
    assert log.count("resuming from") == 1
    assert f"resuming from {tmp_path}/out/checkpoints/model_epoch_0001.pyth: 1 of 2 epochs done" in log
    assert checkpoints(tmp_path / "out")[-1].name == "model_epoch_0002.pyth"


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie, which nobody waits for, has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_parent_alone_ends_its_processes(data_dir, tmp_path, number):
    args = settings(data_dir, OUT_DIR=tmp_path / "out", PORT=free_port())
    process = start(script(tmp_path, FORKING + TROUBLE), "waiting", *args)
    children = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(number)  # to it alone: a terminal would send it to all
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and messages(err) == []
    assert all(map(gone, children))


def test_without_their_parent_the_processes_end(data_dir, tmp_path):
    args = settings(data_dir, OUT_DIR=tmp_path / "out", PORT=free_port())
    process = start(script(tmp_path, TROUBLE), "waiting", *args)
    children = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while not all(map(gone, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, children))


@pytest.fixture
def two_gpus(monkeypatch):
    """As far as counting goes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)


def never(cfg):
    raise AssertionError("not to be called")


def test_a_port_in_use_is_one_clear_line(two_gpus):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^PORT {port} on localhost cannot be used \(Address already in use\)"):
            launch.launch(never, load_cfg(None, ["NUM_GPUS", "2", "PORT", str(port)]))


def test_a_host_that_does_not_exist_is_one_clear_line(two_gpus):
    cfg = load_cfg(None, ["NUM_GPUS", "2", "HOST", "no-such-host.invalid"])
    with pytest.raises(ValueError, match=r"^HOST no-such-host\.invalid cannot be used"):
        launch.launch(never, cfg)


def test_more_gpus_than_present(two_gpus):
    cfg = load_cfg(None, ["NUM_GPUS", "4"])
    with pytest.raises(ValueError, match="NUM_GPUS 4: this machine has 2 usable GPUs; lower NUM_GPUS"):
        launch.launch(never, cfg)


def test_under_torchrun_its_process_count_is_what_is_asked_for(two_gpus, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="NUM_GPUS 3: this machine has 2 usable GPUs"):
        launch.launch(never, load_cfg(None, ["NUM_GPUS", "1"]))


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_one_device_needs_no_other_process(two_gpus, num_gpus):
    cfg, seen = load_cfg(None, ["NUM_GPUS", str(num_gpus)]), []
    launch.launch(seen.append, cfg)
    assert seen == [cfg]
