import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.checkpoints.checkpoint import checkpoints
from core.config import load_cfg
from core.logging import read_stats, setup_logging
from core.processes import distributed
from core.trainer import Run
from tests.small_run import (
    ROOT,
    SMALL_MODEL,
    SMALL_TRAINING,
    free_port,
    landmarks,
    messages,
    overrides,
    python,
    script,
    start,
)

# Each process is told by its environment whether it is one of several, as torchrun's are. All are forked from one that
# has its imports behind it, with torch's compiler, which DistributedDataParallel loads.
TEN_STEPS = """
import json, os, sys
import torch
import torch._dynamo
from core import builders
from core.config import load_cfg
from core.processes.distributed import all_reduce_sum, is_main, world_size
from core.processes.launch import launch
from core.precise_bn import update_precise_bn

def ten_steps(cfg):
    torch.manual_seed(0)
    model = builders.build_classifier(cfg).double().eval()
    model.desc_cls.train()  # this head keeps a running mean over the global batch
    step = builders.build_step(cfg, model, builders.build_optimizer(cfg, model))
    loader = builders.build_train_loader(cfg)
    losses = []
    for epoch in range(4):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            loss, _ = step(batch.images.double(), batch.labels)
            losses.append(all_reduce_sum(loss).item() / world_size())
    return losses[:10], model.desc_cls.t.item(), [p.detach().abs().sum().item() for p in model.parameters()]

def statistics(cfg):
    # A process takes half of each batch of four, so that one process with batches of two sees the same halves.
    halves = cfg.clone()
    halves.defrost()
    halves.TRAIN.BATCH_SIZE = 4 if world_size() > 1 else 2
    torch.manual_seed(0)
    model = builders.build_classifier(cfg).double()
    update_precise_bn(model, Doubled(builders.build_train_loader(halves)), batches=99)
    return [b.double().norm().item() for name, b in model.named_buffers() if "running" in name]

class Doubled:
    def __init__(self, loader):
        self.loader = loader
    def __len__(self):
        return len(self.loader)
    def __iter__(self):
        return (batch._replace(images=batch.images.double()) for batch in self.loader)

def work(cfg):
    torch.set_num_threads(1)
    losses, t, weights = ten_steps(cfg)
    found = {"losses": losses, "t": t, "weights": weights, "statistics": statistics(cfg)}
    if is_main():
        print(json.dumps(found))

children = []
for name, environment in json.loads(sys.argv[1]).items():
    children.append(os.fork())
    if children[-1] == 0:
        os.environ.update(environment)
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 1)
        workers = ["DATA_LOADER.NUM_WORKERS", "2"] if environment else []
        launch(work, load_cfg(None, [*sys.argv[2:], *workers]))
        sys.exit()
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


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
    args = settings(data_dir, **{"MODEL.HEADS.CLS_LAYER": "curricularface", "OPTIM.BASE_LR": 0.01})
    environments = dict(zip(("one", "first", "second"), ({}, *ranks(2)), strict=True))
    process = start(script(tmp_path, TEN_STEPS), json.dumps(environments), *args)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (tmp_path / "second").read_text() == ""  # only the first process speaks
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "first"))
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
    assert sorted(os.listdir(cfg.OUT_DIR)) == ["checkpoints", "config.yaml", "stdout.log"]
    assert sorted(os.listdir(Path(cfg.OUT_DIR) / "checkpoints")) == ["model_best.pyth", "model_epoch_0001.pyth"]
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
    run.resume(checkpoints(cfg.OUT_DIR)[-1])
    setup_logging(None)
    with run.faults:
        run.evaluate(run.evaluated, run.faults)
    (one,) = read_stats(capsys.readouterr().out.splitlines())
    assert two["images"] == one["images"] == 5 and one["loss"] is not None
    for key in ("loss", "top1_err", "top5_err", "min_top1_err"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key


def test_alone_the_exchanges_do_nothing():
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce_sum(tensor) is tensor and tensor.tolist() == [1.0, 2.0]
    distributed.broadcast_from_main([tensor])
    distributed.barrier()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
