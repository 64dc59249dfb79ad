"""A class matrix split over real processes against the replicated head, and its way through checkpoints.

Run as a script, this file starts those processes.
"""

import contextlib
import importlib
import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from model import margin_loss
from model.margin import CosineHead, build_head
from model.sharded import Shards, shard, shard_bounds

ROOT = Path(__file__).parents[2]
KINDS = ["cosine", "arcface", "curricularface"]
CASES = [(kind, torch.float64) for kind in KINDS] + [("curricularface", torch.float32)]
DIM, CLASSES, BATCH = 6, 11, 12  # 11 classes divide by neither 2 nor 3, 12 images by both
SITTINGS = {3: range(3), 2: range(3, 5), 1: range(5, 6)}  # the steps of 3 processes, of 2 that go on, and of 1
SCALED = 8.0  # what a gradient scaler does to the loss


def batches(step: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The global batches of a step, whose gradients are added up: one or two."""
    generator = torch.Generator().manual_seed(step)
    result = []
    for _ in range(1 + step % 2):
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64).to(dtype)
        result.append((x, torch.randint(CLASSES, (BATCH,), generator=generator)))
    return result


class Network(torch.nn.Module):
    def __init__(self, kind: str, dtype: torch.dtype, **head):
        super().__init__()
        self.body = torch.nn.Linear(5, DIM)
        self.desc_cls = build_head(kind, DIM, CLASSES, scale=20.0, margin=0.3, **head)
        self.to(dtype)

    def describe(self, x: torch.Tensor) -> torch.Tensor:
        self.descriptors = self.body(x)
        if self.descriptors.requires_grad:
            self.descriptors.retain_grad()
        return self.descriptors

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.desc_cls.loss(self.describe(x), labels)


def start(kind: str, dtype: torch.dtype) -> dict:
    """A checkpoint: the network before the first step, with a class that equals another, and one without length."""
    torch.manual_seed(3)
    network = Network(kind, dtype)
    state = network.state_dict()
    state["desc_cls.weight"][CLASSES - 1] = state["desc_cls.weight"][0]
    state["desc_cls.weight"][4] = 0.0
    return {"model": state, "momentum": {key: torch.zeros_like(value) for key, value in network.named_parameters()}}


def optimizer_of(network: Network, momentum: dict) -> torch.optim.SGD:
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)
    for key, value in momentum.items():
        optimizer.state[parameters[key]]["momentum_buffer"] = value.clone()
    return optimizer


def unscale(network: Network) -> None:
    for parameter in network.parameters():
        parameter.grad /= SCALED


# ------------------------------------------------------------------------------------------------------ one process


def sit(rank: int, world: int, kind: str, dtype: torch.dtype, checkpoint: dict) -> tuple[dict, dict]:
    """Go on from a checkpoint as one of `world` processes: what was seen on the way, and the checkpoint after it."""
    network = Network(kind, dtype, sharded=(rank, world))
    head, name = network.desc_cls, "desc_cls.weight"
    own = {key: checkpoint[key] | {name: head.shard(checkpoint[key][name])} for key in ("model", "momentum")}
    network.load_state_dict(own["model"])
    optimizer = optimizer_of(network, own["momentum"])
    network._ddp_params_and_buffers_to_ignore = [name] if world > 1 else []
    ddp = DistributedDataParallel(network)
    seen = {"steps": []}
    for step in SITTINGS[world]:
        optimizer.zero_grad()
        found = {"parts": []}
        todo = batches(step, dtype)
        for x, labels in todo:
            x, labels = x.chunk(world)[rank], labels.chunk(world)[rank]
            with ddp.no_sync() if len(found["parts"]) < len(todo) - 1 else contextlib.nullcontext():
                loss, ranks = ddp(x, labels)
                (loss * SCALED).backward()
            found["parts"].append((loss.detach(), ranks, network.descriptors.grad / SCALED))
        unscale(network)
        found["body"], found["head"] = network.body.weight.grad.clone(), head.gather(head.weight.grad)
        optimizer.step()
        found["t"] = head.t.clone() if kind == "curricularface" else None
        seen["steps"].append(found)
    if dtype == torch.float32:
        before = head.t.clone()
        head.zero_grad()
        x, labels = batches(90, dtype)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = network(x.chunk(world)[rank], labels.chunk(world)[rank])
        loss.backward()
        seen["autocast"] = (network.descriptors.detach(), loss, network.descriptors.grad, head.gather(head.weight.grad))
        head.t.copy_(before)
    network.eval()
    with head.gathered(), torch.no_grad():  # every process validates another number of batches
        seen["validation"] = [ddp.module(*batches(50 + i, dtype)[0]) for i in range(rank + 1)]
    momentum = {key: optimizer.state[p]["momentum_buffer"] for key, p in network.named_parameters()}
    return seen, {
        "model": network.state_dict() | {name: head.gather(head.weight)},
        "momentum": momentum | {name: head.gather(momentum[name])},
        "full": head.full_weight(),
    }


def process(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    margin_loss.CPU_BLOCK = 2  # several blocks on every process
    rendezvous = f"file://{folder}/rendezvous{world}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    before = torch.load(folder / f"before{world}.pt")
    results = [sit(rank, world, *case, checkpoint) for case, checkpoint in zip(CASES, before, strict=True)]
    torch.save([seen for seen, _ in results], folder / f"seen{world}.{rank}.pt")
    torch.save([after for _, after in results], folder / f"after{world}.{rank}.pt")
    dist.barrier()  # or the first to leave may abort the others
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ all of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where 3 processes left what they saw, then 2 that went on from their checkpoint, then 1."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torch.save([start(*case) for case in CASES], folder / "before3.pt")
    ended = subprocess.run([sys.executable, __file__, str(folder)], env=environment, timeout=300)
    assert ended.returncode == 0
    return folder


def assert_close(found: torch.Tensor, want: torch.Tensor, tolerance: float | None = None) -> None:
    """Within rounding of the largest value; in float32 the steps before have drifted apart by as much again."""
    tolerance = tolerance or (1e-11 if want.dtype == torch.float64 else 3e-5)
    assert found.shape == want.shape
    assert (found - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-30)


def ranks_by_sorting(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    order = logits.sort(dim=1, descending=True, stable=True).indices
    return (order == labels[:, None]).nonzero()[:, 1]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_the_replicated_head_at_every_step(folder, case):
    """Losses, ranks and all gradients; and with them the checkpoints that went from 3 processes to 2, and to 1."""
    kind, dtype = CASES[case]
    checkpoint = start(kind, dtype)
    network = Network(kind, dtype)
    network.load_state_dict(checkpoint["model"])
    optimizer = optimizer_of(network, checkpoint["momentum"])
    for world, steps in SITTINGS.items():
        seen = [torch.load(folder / f"seen{world}.{rank}.pt")[case] for rank in range(world)]
        for number, step in enumerate(steps):
            optimizer.zero_grad()
            found = [process["steps"][number] for process in seen]
            for part, (x, labels) in enumerate(batches(step, dtype)):
                logits = network.desc_cls(network.describe(x), labels)
                losses = F.cross_entropy(logits, labels, reduction="none")
                (losses.mean() * SCALED).backward()
                loss, ranks, grad = zip(*(process["parts"][part] for process in found), strict=True)
                assert_close(torch.stack(loss), losses.detach().view(world, -1).mean(1))
                assert torch.equal(torch.cat(ranks), ranks_by_sorting(logits, labels))
                assert_close(torch.cat(grad), network.descriptors.grad / SCALED * world)  # each of its own mean
            unscale(network)
            assert_close(found[0]["head"], network.desc_cls.weight.grad)
            for process in found:
                assert_close(process["body"], network.body.weight.grad)
                if kind == "curricularface":
                    assert torch.equal(process["t"], found[0]["t"])
                    torch.testing.assert_close(process["t"], network.desc_cls.t, rtol=0, atol=1e-8)
            optimizer.step()
        after = torch.load(folder / f"after{world}.0.pt")[case]
        for key, value in network.named_parameters():
            assert_close(after["model"][key], value.detach())
            assert_close(after["momentum"][key], optimizer.state[value]["momentum_buffer"])


@pytest.mark.parametrize("case", range(len(CASES)))
def test_validation_uses_all_classes_without_communication(folder, case):
    kind, dtype = CASES[case]
    for world in SITTINGS:
        network = Network(kind, dtype)
        network.load_state_dict(torch.load(folder / f"after{world}.0.pt")[case]["model"])
        for rank in range(world):
            seen = torch.load(folder / f"seen{world}.{rank}.pt")[case]["validation"]
            assert len(seen) == rank + 1
            for i, (loss, ranks) in enumerate(seen):
                x, labels = batches(50 + i, dtype)[0]
                logits = network.desc_cls(network.body(x))
                assert_close(loss, F.cross_entropy(logits, labels).detach())
                assert torch.equal(ranks, ranks_by_sorting(logits, labels))


def test_bfloat16_descriptors(folder):
    for world in SITTINGS:
        seen = [torch.load(folder / f"seen{world}.{rank}.pt")[-1]["autocast"] for rank in range(world)]
        descriptors, losses, grads, weight_grads = zip(*seen, strict=True)
        head = Network(*CASES[-1]).desc_cls.train()
        after = torch.load(folder / f"after{world}.0.pt")[-1]["model"]
        head.load_state_dict({key.removeprefix("desc_cls."): v for key, v in after.items() if "desc_cls" in key})
        x = torch.cat(descriptors)
        assert x.dtype == torch.bfloat16
        x = x.float().requires_grad_()
        labels = batches(90, torch.float32)[0][1]
        each = F.cross_entropy(head(x, labels), labels, reduction="none")
        each.mean().backward()
        assert_close(torch.stack(losses).detach(), each.detach().view(world, -1).mean(1))
        assert_close(weight_grads[0], head.weight.grad)
        assert_close(torch.cat(grads).float(), x.grad * world, tolerance=2**-8)


def test_every_rank_gets_the_full_weight_and_only_the_first_the_checkpoint(folder):
    for world in (2, 3):
        after = [torch.load(folder / f"after{world}.{rank}.pt") for rank in range(world)]
        for case in range(len(CASES)):
            full = after[0][case]["model"]["desc_cls.weight"]
            assert full.shape == (CLASSES, DIM)
            for rank in range(world):
                assert torch.equal(after[rank][case]["full"], full)
                assert rank == 0 or after[rank][case]["momentum"]["desc_cls.weight"] is None


# ------------------------------------------------------------------------------------------------------ in this process


@pytest.mark.parametrize(("classes", "world"), [(11, 3), (11, 2), (3, 3), (10, 4), (81313, 8), (7, 1)])
def test_shards_are_contiguous_and_even(classes, world):
    bounds = [shard_bounds(classes, rank, world) for rank in range(world)]
    assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
    assert bounds[-1][1] == classes
    sizes = {last - first for first, last in bounds}
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    full = torch.arange(2.0 * classes).view(classes, 2)
    assert torch.equal(torch.cat([shard(full, rank, world) for rank in range(world)]), full)


def test_fewer_classes_than_processes():
    with pytest.raises(ValueError, match=r"3 classes cannot be split over 4 processes: switch the sharded head off"):
        build_head("arcface", 4, 3, scale=1.0, margin=0.1, sharded=(0, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_replicated_head_does(kind):
    def start(**sharded) -> tuple[CosineHead, torch.Tensor]:
        torch.manual_seed(5)
        return build_head(kind, DIM, CLASSES, scale=1.0, margin=0.1, **sharded), torch.rand(3)

    whole, after = start()
    parts = [start(sharded=(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([head.weight for head, _ in parts]), whole.weight)
    assert all(torch.equal(draw, after) for _, draw in parts)  # whatever is drawn next is the same too
    for head, _ in parts:
        assert list(head.state_dict()) == list(whole.state_dict())
        assert head.weight.untyped_storage().nbytes() == head.weight.numel() * 4  # does not hold the full matrix
        assert head.num_classes == CLASSES


def test_all_classes_are_known_only_while_gathered():
    head = build_head("arcface", DIM, CLASSES, scale=1.0, margin=0.1, sharded=(0, 2)).eval()
    with pytest.raises(AssertionError, match="only within gathered"):
        head.loss(torch.ones(2, DIM), torch.tensor([0, 1]))


def test_one_process_needs_no_group():
    head = build_head("curricularface", DIM, CLASSES, scale=1.0, margin=0.1)
    assert not dist.is_initialized()
    with head.gathered():
        head.eval().loss(torch.ones(2, DIM), torch.tensor([0, 1]))
    assert head.full_weight().data_ptr() == head.gather(head.weight).data_ptr() == head.weight.data_ptr()
    assert Shards(CLASSES).bounds == (0, CLASSES)


def sittings(folder: Path) -> None:
    """All processes are forked from this one: they have what it has imported, torch's compiler (for DDP) included."""
    importlib.import_module("torch._dynamo")
    forking = multiprocessing.get_context("fork")
    for world in SITTINGS:
        children = [forking.Process(target=process, args=(rank, world, folder), daemon=True) for rank in range(world)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * world
        os.link(folder / f"after{world}.0.pt", folder / f"before{world - 1}.pt")


if __name__ == "__main__":
    sittings(Path(sys.argv[1]))
