import math
import time

import pytest
import torch
import torch.nn.functional as F

from core import meters
from core.meters import Clock, Sums, errors, memory_mb

CPU = torch.device("cpu")


def literal_errors(logits: list[list[float]], labels: list[int], k: int) -> int:
    """Count the images whose label is not among the k largest logits, by sorting each row."""
    wrong = 0
    for row, label in zip(logits, labels, strict=True):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        wrong += label not in best
    return wrong


@pytest.mark.parametrize("classes", [1, 3, 5, 40])
def test_errors_against_sorting(classes):
    torch.manual_seed(classes)
    logits = torch.randn(50, classes)
    labels = torch.randint(classes, (50,))
    for k, got in zip((1, 5), errors(logits, labels), strict=True):
        assert int(got) == literal_errors(logits.tolist(), labels.tolist(), k)


def test_perfect_and_worst_predictions():
    logits = 10 * torch.eye(7)
    right, wrong = torch.arange(7), (torch.arange(7) + 1) % 7
    assert [int(e) for e in errors(logits, right)] == [0, 0]
    assert int(errors(logits, wrong)[0]) == 7
    ranked = torch.arange(7.0).flip(0).expand(7, 7)  # class 0 first
    assert [int(e) for e in errors(ranked, torch.arange(7), ks=(1, 5, 7))] == [6, 2, 0]


def test_with_fewer_classes_than_k_every_label_is_a_hit():
    top1, top5 = errors(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0]))
    assert (int(top1), int(top5)) == (1, 0)


def test_sums_are_means_over_images_not_over_batches():
    torch.manual_seed(1)
    batches = [(torch.randn(n, 8), torch.randint(8, (n,))) for n in (5, 1, 3)]
    sums = Sums(CPU)
    for logits, labels in batches:
        sums.add(F.cross_entropy(logits, labels), logits, labels)
    logits, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    got = sums.read()
    assert got["images"] == 9
    assert got["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    for key, k in (("top1_err", 1), ("top5_err", 5)):
        assert got[key] == pytest.approx(100 * literal_errors(logits.tolist(), labels.tolist(), k) / 9, rel=1e-12)


def test_reading_changes_nothing_and_reset_forgets():
    sums = Sums(CPU)
    sums.add(torch.tensor(2.0), torch.eye(4), torch.zeros(4, dtype=torch.long))
    assert sums.read() == sums.read() == {"loss": 2.0, "top1_err": 75.0, "top5_err": 0.0, "images": 4}
    sums.reset()
    assert sums.read() == {"loss": 0.0, "top1_err": 0.0, "top5_err": 0.0, "images": 0}


def test_counts_stay_exact_beyond_float32():
    sums = Sums(CPU)
    sums.sums += 2.0**24  # as after 16.8 million images
    sums.add(torch.tensor(0.0), torch.zeros(1, 2), torch.tensor([0]))
    assert sums.read()["images"] == 2**24 + 1


def test_a_loss_that_is_not_finite_is_seen():
    sums = Sums(CPU)
    sums.add(torch.tensor(math.nan), torch.zeros(1, 2), torch.tensor([0]))
    assert math.isnan(sums.read()["loss"])


def test_the_loss_keeps_no_graph():
    sums = Sums(CPU)
    sums.add(torch.tensor(2.0, requires_grad=True) * 3, torch.zeros(1, 2), torch.tensor([0]))
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
