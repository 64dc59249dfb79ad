"""Runs of several processes, each set forked from one that has its imports behind it: real processes, little time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import (
    FORKING_DDP,
    ROOT,
    SMALL_MODEL,
    SMALL_TRAINING,
    child_environment,
    landmarks,
    overrides,
    retrieval_set,
    script,
)

FORKED = """
import json, os, shutil, signal, sys, time
from pathlib import Path
from core import evaluation, precise_bn, trainer
from core.checkpoints.checkpoint import checkpoint_path
from core.config import load_cfg
from core.processes.distributed import rank
from core.base.errors import entry_point
from core.step import TrainStep
from evaler import during_training

torch = launch.torch
torch.set_num_threads(1)
launch.GRACE = 2.0

def stop_before(owner, name, count):
    real, calls = getattr(owner, name), []
    def wrapped(*args, **more):
        calls.append(1)
        if rank() == 1 and len(calls) == count:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*args, **more)
    setattr(owner, name, wrapped)

MOMENTS = {
    "a step": lambda: stop_before(TrainStep, "__call__", 2),
    "between two steps": lambda: stop_before(trainer, "set_learning_rate", 3),
    "statistics of batch norm": lambda: stop_before(precise_bn, "all_reduce_sum", 5),
    "validation": lambda: stop_before(evaluation.Sums, "add", 1),
    "retrieval": lambda: stop_before(during_training, "describe_batch", 1),
    "the end of retrieval": lambda: stop_before(during_training, "gather_objects", 1),
    "gathering a checkpoint": lambda: stop_before(trainer, "state_of", 1),
    "the end of the run": lambda: stop_before(launch.dist, "destroy_process_group", 1),
}

def train(cfg):
    trainer.train(cfg, score=during_training.score_sets)

def in_fork(work, log):
    pid = os.fork()
    if pid:
        return pid
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    code = 99
    try:
        entry_point(work)()
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

def stopped(folder, settings):
    began, started = time.monotonic(), {}
    for moment in sys.argv[3].split(","):
        cfg = load_cfg(None, [*settings, "OUT_DIR", str(folder / moment)])
        def work(moment=moment, cfg=cfg):
            MOMENTS[moment]()
            launch.spawn(train, cfg, 2)
        started[in_fork(work, folder / f"{moment}.log")] = moment
    found = {}
    while started:
        pid, status = os.wait()
        found[started.pop(pid)] = os.waitstatus_to_exitcode(status), time.monotonic() - began
    return found

def resumed(folder, settings):
    world, more = int(sys.argv[3]), ["TRAIN.CHECKPOINT_ITERS", "1", "TRAIN.KEEP_CHECKPOINTS", "99"]
    outs = folder / "whole", folder / "resumed"
    for out in outs:
        cfg = load_cfg(None, [*settings, *more, "OUT_DIR", str(out)])
        pid = in_fork(lambda cfg=cfg: launch.spawn(train, cfg, world), f"{out}.log")
        assert os.waitpid(pid, 0)[1] == 0, Path(f"{out}.log").read_text()
        if out == outs[0]:
            start = checkpoint_path(outs[1], 0, 2)
            start.parent.mkdir(parents=True)
            shutil.copy(checkpoint_path(out, 0, 2), start)
    states = [torch.load(checkpoint_path(out, 1), weights_only=True)["model_state"] for out in outs]
    return {
        "different": [key for key in states[0] if not torch.equal(states[0][key], states[1][key])],
        "resumed": "resuming from" in (folder / "resumed.log").read_text(),
    }

class Small(torch.nn.Module):  # its gradients come in another order than its parameters stand in
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(40, 40) for _ in range(9))

    def forward(self, images, labels):
        for layer in (*self.layers[::2], *self.layers[1::2]):
            images = layer(images).tanh()
        return images.square().mean() * (1 + labels.float().mean()), labels

def two_sittings(cfg):
    for static in (True, False):
        compare(static)

def compare(static):
    def batch(number):
        generator = torch.Generator().manual_seed(10 * number + rank())
        return torch.randn(4, 40, generator=generator), torch.arange(4)
    def sitting(state):
        model = Small()
        model.load_state_dict(state or model.state_dict())
        network = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=static)
        step = TrainStep(network, torch.optim.SGD(model.parameters(), lr=0.5))
        step.settle_buckets(torch.zeros(4, 40), torch.zeros(4, dtype=torch.int64))
        return model, step
    model, step = sitting(None)
    step(*batch(1))
    again, step_again = sitting({key: value.clone() for key, value in model.state_dict().items()})
    step(*batch(2))
    step_again(*batch(2))
    pairs = zip(model.parameters(), again.parameters())
    os.write(1, b"different: %d\\n" % sum(not torch.equal(a, b) for a, b in pairs))

def small(folder, settings):
    cfg = load_cfg(None, [*settings, "TRAIN.BATCH_SIZE", "6"])
    pid = in_fork(lambda: launch.spawn(two_sittings, cfg, int(sys.argv[3])), folder / "small.log")
    return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}

print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]), sys.argv[4:])))
"""
SETTINGS = {
    "MODEL.FUSION": "global",
    "OPTIM.MAX_EPOCH": 1,
    "OPTIM.BASE_LR": 0.001,
    "BN.USE_PRECISE_STATS": True,
    "BN.NUM_SAMPLES_PRECISE": 8,
}


def forked(folder: Path, kind: str, what: str, *settings: str) -> dict:
    """What the script FORKED finds."""
    command = [sys.executable, str(script(folder, FORKING_DDP + FORKED)), kind, str(folder), what, *settings]
    environment = child_environment() | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def check_stopped(tmp_path: Path, moments: list[str]) -> None:
    data = retrieval_set(landmarks(tmp_path / "data", train=12, val=4))
    place = {"DATA_LOADER.DATA_DIR": data, "INFER.DATA_DIR": data, "TEST.RETRIEVAL": "toy", "INFER.SCALES": 1}
    settings = overrides(SMALL_MODEL, SMALL_TRAINING, SETTINGS, place, {"DIST_TIMEOUT": 8})
    found = forked(tmp_path, "stopped", ",".join(moments), *settings)
    for moment in moments:
        said = (tmp_path / f"{moment}.log").read_text()
        code, _ = found[moment]
        assert code == 1, (moment, said)
        assert "error: process 1 of the run did not answer any more and was ended" in said, (moment, said)
        assert "Traceback" not in said, (moment, said)


def test_a_stopped_process_ends_the_run(tmp_path):
    check_stopped(tmp_path, ["between two steps"])


@pytest.mark.soak
def test_a_process_stopped_anywhere_ends_the_run(tmp_path):
    moments = ["a step", "between two steps", "statistics of batch norm", "validation", "retrieval"]
    check_stopped(tmp_path, [*moments, "the end of retrieval", "gathering a checkpoint", "the end of the run"])


def test_three_processes_add_in_the_same_order_in_every_sitting(tmp_path):
    """From three on, the order in which gradients are added depends on where they stand in their buckets."""
    assert forked(tmp_path, "small", "3", "NUM_GPUS", "0", "DIST_TIMEOUT", "100") == {"code": 0}
    assert (tmp_path / "small.log").read_text().splitlines() == ["different: 0"] * 6


@pytest.mark.soak
@pytest.mark.parametrize("world", [3, 4])
def test_several_processes_go_on_bit_for_bit(tmp_path, world):
    data = landmarks(tmp_path / "data", train=24, val=0)
    more = {"DATA_LOADER.DATA_DIR": data, "TEST.SPLIT": "", "TRAIN.BATCH_SIZE": 2 * world}
    found = forked(tmp_path, "resumed", str(world), *overrides(SMALL_MODEL, SMALL_TRAINING, SETTINGS, more))
    assert found == {"different": [], "resumed": True}
