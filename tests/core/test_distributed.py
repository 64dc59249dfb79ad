import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core import distributed
from core.checkpoint import newest_checkpoint, resume
from core.config import load_cfg
from core.logging import read_stats, setup_logging
from core.trainer import Run
from datasets.loader import TrainBatches
from tests.small_run import (
    ROOT,
    SMALL_MODEL,
    SMALL_TRAINING,
    child_environment,
    cut_short,
    landmarks,
    messages,
    overrides,
    python,
)

# One process that is told by its environment whether it is one of several, as torchrun's are.
TEN_STEPS = """
import json, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from core import builders
from core.config import load_cfg
from core.distributed import all_reduce_sum, is_main, launch, world_size
from core.precise_bn import update_precise_bn
from core.trainer import train_step

def ten_steps(cfg):
    torch.manual_seed(0)
    model = builders.build_classifier(cfg).double().eval()
    network = DistributedDataParallel(model) if world_size() > 1 else model
    model.desc_cls.train()  # this head keeps a running mean over the global batch
    optimizer = builders.build_optimizer(cfg, model)
    loader = builders.build_train_loader(cfg)
    losses = []
    for epoch in range(4):
        loader.batch_sampler.set_epoch(epoch)
        for images, labels, _ in loader:
            loss, _ = train_step(network, optimizer, images.double(), labels)
            losses.append(all_reduce_sum(loss).item() / world_size())
    return losses[:10], model.desc_cls.t.item(), [p.detach().abs().sum().item() for p in model.parameters()]

def statistics(cfg):
    # A process takes half of each batch of four, so that one process with batches of two sees the same halves.
    halves = cfg.clone()
    halves.defrost()
    halves.TRAIN.BATCH_SIZE = 4 if world_size() > 1 else 2
    torch.manual_seed(0)
    model = builders.build_classifier(cfg).double()
    update_precise_bn(model, Doubled(builders.build_train_loader(halves)), torch.device("cpu"), batches=99)
    return [b.double().norm().item() for name, b in model.named_buffers() if "running" in name]

class Doubled:
    def __init__(self, loader):
        self.loader = loader
    def __len__(self):
        return len(self.loader)
    def __iter__(self):
        return ((images.double(), *rest) for images, *rest in self.loader)

def work(cfg):
    torch.set_num_threads(1)
    losses, t, weights = ten_steps(cfg)
    found = {"losses": losses, "t": t, "weights": weights, "statistics": statistics(cfg)}
    if is_main():
        print(json.dumps(found))

launch(work, load_cfg(None, sys.argv[1:]))
"""

# Two processes started by this one, in several kinds of trouble.
TROUBLE = """
import os, signal, sys, time
from core.config import load_cfg
from core.distributed import _spawn, barrier, rank
from core.environment import entry_point
from core.output import output_folder
from core.trainer import train

def killed(cfg):
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)

def broken(cfg):
    if rank() == 1:
        raise RuntimeError("a defect of ours")
    barrier()
    time.sleep(300)

def waiting(cfg):
    print(os.getpid(), flush=True)
    time.sleep(300)

@entry_point
def main():
    cfg = load_cfg(None, sys.argv[2:])
    with output_folder(cfg):
        _spawn(globals()[sys.argv[1]], cfg, 2)

if __name__ == "__main__":
    main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def script(folder: Path, source: str) -> Path:
    path = folder / "script.py"
    path.write_text(source)
    return path


def start(path: Path, *args: str, **environment: str) -> subprocess.Popen:
    env = child_environment() | {"PYTHONPATH": str(ROOT)} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, str(path), *args],
        cwd=path.parent,
        env=env,
        # A test run started in the background ignores SIGINT and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **pipes,
    )


def ranks(world: int) -> Iterator[dict[str, str]]:
    """The environment that torchrun gives each process."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    for rank in map(str, range(world)):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        yield place | numbers


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return landmarks(tmp_path_factory.mktemp("data"), train=12, val=5)


def settings(data_dir: Path, **more) -> list[str]:
    return overrides(SMALL_MODEL, SMALL_TRAINING, {"DATA_LOADER.DATA_DIR": data_dir}, more)


def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(data_dir, tmp_path):
    """Augmentation on, batch norm in eval mode, float64, gloo; and no number of workers changes anything."""
    path = script(tmp_path, TEN_STEPS)
    args = settings(data_dir, **{"MODEL.HEADS.CLS_LAYER": "curricularface", "OPTIM.BASE_LR": 0.01})
    processes = [start(path, *args)]
    processes += [start(path, *args, "DATA_LOADER.NUM_WORKERS", "2", **environment) for environment in ranks(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert outputs[2][0] == ""  # only the first process speaks
    one, two = json.loads(outputs[0][0]), json.loads(outputs[1][0])
    assert len(one["losses"]) == 10 and len(set(one["losses"])) == 10
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9, abs=1e-9)
    assert two["t"] == pytest.approx(one["t"], rel=1e-9) and one["t"] != 0
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9)
    assert len(one["statistics"]) > 100
    assert two["statistics"] == pytest.approx(one["statistics"], rel=1e-9)


@pytest.fixture(scope="module")
def torchrun(data_dir, tmp_path_factory):
    """A run of two processes; its settings and what it said."""
    folder = tmp_path_factory.mktemp("torchrun")
    more = {"OUT_DIR": folder / "out", "OPTIM.MAX_EPOCH": 1, "MODEL.HEADS.CLS_LAYER": "linear"}
    args = settings(data_dir, **more, **{"BN.ZERO_INIT_FINAL_GAMMA": True, "BN.MOM": 0.5})
    (folder / "empty.yaml").touch()
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py")
    return args, python(*command, "--cfg", "empty.yaml", *args, cwd=folder)


def test_a_run_started_by_torchrun(torchrun):
    args, ended = torchrun
    assert ended.returncode == 0, ended.stderr
    cfg = load_cfg(None, args)
    assert sorted(os.listdir(cfg.OUT_DIR)) == ["checkpoints", "config.yaml"]
    assert os.listdir(Path(cfg.OUT_DIR) / "checkpoints") == ["model_epoch_0001.pyth"]
    kinds = [(record["_type"], record.get("iter")) for record in read_stats(ended.stdout.splitlines())]
    iterations = [("train_iter", f"{i}/3") for i in (1, 2, 3)]
    assert kinds == [*iterations, ("train_epoch", None), ("test_epoch", None)]
    assert ended.stdout.count("2 x CPU") == 1 and ended.stdout.count("saved ") == 1
    assert ended.stderr.count("was never read") == 1
    assert [line for line in messages(ended.stderr) if "OMP_NUM_THREADS" not in line] == []
    assert [record["images"] for record in read_stats(ended.stdout.splitlines())] == [4, 4, 4, 12, 5]


def test_validation_by_two_processes_is_that_of_one(torchrun, capsys):
    """Each of the five images exactly once, and by the weights and statistics that are saved."""
    args, ended = torchrun
    two = read_stats(ended.stdout.splitlines())[-1]
    cfg = load_cfg(None, args)
    run = Run(cfg, torch.device("cpu"))
    run.epochs_done = resume(newest_checkpoint(cfg.OUT_DIR), run.model, run.optimizer)
    setup_logging(None)
    run.validate()
    (one,) = read_stats(capsys.readouterr().out.splitlines())
    assert two["images"] == one["images"] == 5 and one["loss"] is not None
    for key in ("loss", "top1_err", "top5_err", "min_top1_err"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        ("killed", 1, ["error: a process of the run ended: process 1 terminated with signal SIGKILL"]),
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
    began = time.monotonic()
    process = start(script(tmp_path, TROUBLE), trouble, *settings(data_dir, **more))
    _, err = process.communicate(timeout=150)
    assert time.monotonic() - began < 120
    assert process.returncode == code
    assert not (tmp_path / "made").exists()
    if trouble == "broken":
        assert "RuntimeError: a defect of ours" in err and "Traceback" in err
    elif trouble == "train":
        [line] = messages(err) if len(messages(err)) == 1 else pytest.fail(err)
        assert line.startswith("error: ") and f"{second[0][1]:02d}.jpg" in line and said in line
    else:
        assert messages(err) == said


def test_interrupting_the_parent_ends_its_processes(data_dir, tmp_path):
    args = settings(data_dir, OUT_DIR=tmp_path / "out", PORT=free_port())
    process = start(script(tmp_path, TROUBLE), "waiting", *args)
    children = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGINT)  # to it alone: a terminal would send it to all
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and messages(err) == ["interrupted"]
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


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
            distributed.launch(never, load_cfg(None, ["NUM_GPUS", "2", "PORT", str(port)]))


def test_a_host_that_does_not_exist_is_one_clear_line(two_gpus):
    cfg = load_cfg(None, ["NUM_GPUS", "2", "HOST", "no-such-host.invalid"])
    with pytest.raises(ValueError, match=r"^PORT 10001 on no-such-host\.invalid cannot be used"):
        distributed.launch(never, cfg)


def test_more_gpus_than_present(two_gpus):
    cfg = load_cfg(None, ["NUM_GPUS", "4"])
    with pytest.raises(ValueError, match="NUM_GPUS 4: this machine has 2 usable GPUs; lower NUM_GPUS"):
        distributed.launch(never, cfg)


def test_under_torchrun_its_process_count_is_what_is_asked_for(two_gpus, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="NUM_GPUS 3: this machine has 2 usable GPUs"):
        distributed.launch(never, load_cfg(None, ["NUM_GPUS", "1"]))


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_one_device_needs_no_other_process(two_gpus, num_gpus):
    cfg, seen = load_cfg(None, ["NUM_GPUS", str(num_gpus)]), []
    distributed.launch(seen.append, cfg)
    assert seen == [cfg]


def test_alone_the_exchanges_do_nothing():
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce_sum(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    distributed.broadcast_from_main([tensor])
    distributed.barrier()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
