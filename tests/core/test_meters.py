import math
import time

import pytest
import torch
import torch.nn.functional as F

from core import meters
from core.meters import Clock, Sums, memory_mb

CPU = torch.device("cpu")


def literal_errors(logits: list[list[float]], labels: list[int], k: int) -> int:
    """Count the images whose label is not among the k largest logits, by sorting each row."""
    wrong = 0
    for row, label in zip(logits, labels, strict=True):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        wrong += label not in best
    return wrong


def ranks_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits > logits.gather(1, labels[:, None])).sum(dim=1)


@pytest.mark.parametrize("classes", [1, 3, 5, 40])
def test_sums_are_means_over_images_not_over_batches(classes):
    torch.manual_seed(classes)
    batches = [(torch.randn(n, classes), torch.randint(classes, (n,))) for n in (50, 1, 3)]
    sums = Sums(CPU)
    for logits, labels in batches:
        sums.add(F.cross_entropy(logits, labels), ranks_of(logits, labels))
    logits, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    got = sums.read()
    assert got["images"] == 54
    assert got["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    for key, k in (("top1_err", 1), ("top5_err", 5)):
        assert got[key] == pytest.approx(100 * literal_errors(logits.tolist(), labels.tolist(), k) / 54, rel=1e-12)


def test_reading_changes_nothing_and_reset_forgets():
    sums = Sums(CPU)
    sums.add(torch.tensor(2.0), torch.tensor([0, 1, 4, 5]))
    assert sums.read() == sums.read() == {"loss": 2.0, "top1_err": 75.0, "top5_err": 25.0, "images": 4}
    sums.reset()
    assert sums.read() == {"loss": 0.0, "top1_err": 0.0, "top5_err": 0.0, "images": 0}


def test_counts_stay_exact_beyond_float32():
    sums = Sums(CPU)
    sums.images = 2**24  # as after 16.8 million images, all wrong
    sums.sums += 2.0**24
    sums.add(torch.tensor(0.0), torch.tensor([0]))
    assert sums.read()["images"] == 2**24 + 1
    assert sums.read()["top1_err"] == 100 * 2**24 / (2**24 + 1)


def test_one_period_merged_into_another_and_both_kept_as_plain_numbers():
    first, second = Sums(CPU), Sums(CPU)
    first.add(torch.tensor(2.0), torch.tensor([0, 7]))
    second.add(torch.tensor(0.1), torch.tensor([1]))
    assert first.state() == [4.0, 1.0, 1.0, 2]
    first.merge(second)
    copy = Sums(CPU)
    copy.restore([first.state()], 0)
    assert (
        copy.read()
        == first.read()
        == pytest.approx({"loss": 4.1 / 3, "top1_err": 200 / 3, "top5_err": 100 / 3, "images": 3})
    )
    assert second.images == 1


def test_the_sums_of_several_processes_go_on_in_one():
    sums = Sums(CPU)
    sums.restore([[1.0, 2.0, 3.0, 4], [10.0, 20.0, 30.0, 40]], 0)
    assert sums.state() == [11.0, 22.0, 33.0, 44]


def test_a_loss_that_is_not_finite_is_seen():
    sums = Sums(CPU)
    sums.add(torch.tensor(math.nan), torch.tensor([0]))
    assert math.isnan(sums.read()["loss"])


def test_the_loss_keeps_no_graph():
    sums = Sums(CPU)
    sums.add(torch.tensor(2.0, requires_grad=True) * 3, torch.tensor([0]))
    assert not sums.sums.requires_grad


def test_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    clock = Clock()
    assert clock.per_iteration == 0.0 and clock.eta(10) == "0:00:00"
    for _ in range(4):
        now[0] += 2.5
        clock.tick()
    assert clock.seconds == 10.0 and clock.per_iteration == 2.5
    assert clock.eta(2) == "0:00:05"
    assert clock.eta(40_000) == "1 day, 3:46:40"


def test_memory_is_that_of_this_process():
    before = memory_mb(CPU)
    block = torch.ones(64 << 20, dtype=torch.float32)  # 256 MiB, touched
    time.sleep(0)
    assert before > 20 and memory_mb(CPU) >= max(before, block.nbytes >> 20)
