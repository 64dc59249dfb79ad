"""Orders and batches, the same for any number of ranks and workers; errors, signals and threads of real workers."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from datasets import loader
from datasets.images.decode import ImageError
from datasets.landmark import LandmarkDataset
from datasets.loader import TrainBatches, class_balanced_order, epoch_order, make_loader
from datasets.transforms import FastTrainTransform, TrainTransform
from datasets.transforms import TestTransform as Resized
from tests.loader_sets import Does, alive

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of 14 small images."""
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for i in range(14):
        cv2.imwrite(str(root / f"{i}.png"), rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8))
    (root / "list.txt").write_text("".join(f"{i}.png {i % 5}\n" for i in range(14)))
    return root


def dataset_of(root: Path, transform=None) -> LandmarkDataset:
    return LandmarkDataset(root, root / "list.txt", transform=transform or TrainTransform(24), num_classes=5, seed=3)


def joined(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


# ------------------------------------------------------------------------------------------------ orders and batches


def test_an_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    order = epoch_order(1000, seed=1, epoch=2)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(order, epoch_order(1000, seed=1, epoch=2))
    for other in ({"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 2}, {"seed": 2, "epoch": 1}):
        assert (order == epoch_order(1000, **other)).mean() < 0.02


def test_an_order_is_known():
    """Literal values: a checkpoint of one machine goes on with the same order on another."""
    assert epoch_order(10, seed=1, epoch=0).tolist() == [5, 0, 9, 3, 2, 4, 6, 1, 8, 7]


def test_the_order_does_not_share_its_stream_with_a_sample():
    sample = np.random.Generator(np.random.PCG64(np.random.SeedSequence([1, 2, 0])))
    assert not np.array_equal(epoch_order(50, seed=1, epoch=2), sample.permutation(50))


LABELS = np.array([7] * 10 + [2] * 3 + [0] * 1 + [9] * 6)


def test_a_class_balanced_order_sees_all_classes_equally_often():
    order = class_balanced_order(LABELS, seed=1, epoch=2)
    assert order.dtype == np.int64
    assert len(order) == 20
    for first in range(0, 20, 4):
        assert sorted(LABELS[order[first : first + 4]]) == [0, 2, 7, 9]
    assert len({tuple(LABELS[order[first : first + 4]]) for first in range(0, 20, 4)}) > 1
    for label, count in ((7, 10), (2, 3), (0, 1), (9, 6)):
        seen = order[LABELS[order] == label]
        assert len(seen) == 5
        for first in range(0, 5, count):  # no image comes again before all came
            assert len(set(seen[first : first + count])) == len(seen[first : first + count])


def test_a_last_pass_is_cut_off():
    labels = np.repeat(np.arange(6), [1, 1, 1, 1, 1, 5])
    counts = np.bincount(labels[class_balanced_order(labels, seed=0, epoch=0)], minlength=6)
    assert counts.sum() == 10
    assert set(counts) == {1, 2}


def test_every_image_has_its_turn_over_the_epochs():
    orders = [class_balanced_order(LABELS, seed=1, epoch=epoch) for epoch in range(300)]
    counts = np.bincount(np.concatenate(orders), minlength=20) / 300
    expected = np.array([0.5] * 10 + [5 / 3] * 3 + [5] + [5 / 6] * 6)
    assert np.abs(counts - expected).max() < 0.15


def test_a_class_balanced_order_is_a_function_of_seed_epoch_and_labels():
    order = class_balanced_order(LABELS, seed=1, epoch=2).tolist()
    assert order == class_balanced_order(LABELS.copy(), seed=1, epoch=2).tolist()
    for other in ({"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 2}):
        assert order != class_balanced_order(LABELS, **other).tolist()
    assert class_balanced_order(np.array([3, 3, 1, 0, 1]), seed=1, epoch=0).tolist() == KNOWN


KNOWN = [3, 0, 4, 1, 3]  # a checkpoint of one machine goes on with the same order on another


def test_orders_of_the_largest_set_take_about_a_second():
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(81313), rng.zipf(1.4, 1580470 - 81313) % 81313])
    start = time.process_time()
    order = class_balanced_order(labels, seed=0, epoch=0)
    assert time.process_time() - start < 5  # 0.7 s where nothing else runs
    counts = np.bincount(labels[order])
    assert counts.min() >= counts.max() - 1


def test_an_order_is_made_once_an_epoch(monkeypatch):
    made = []
    monkeypatch.setattr(loader, "epoch_order", lambda n, **key: made.append(key["epoch"]) or np.arange(n))
    batches = TrainBatches(20, batch_size=6, seed=4)
    for epoch, start in ((0, 0), (0, 1), (1, 0), (1, 2)):
        batches.set_epoch(epoch, start=start)
        list(batches)
    assert made == [0, 1]


def test_class_balanced_batches_are_shares_of_that_order():
    order = class_balanced_order(LABELS, seed=4, epoch=3).tolist()
    for world in (1, 2):
        shares = []
        for rank in range(world):
            kind = {"sampling": "class_balanced", "labels": LABELS}
            batches = TrainBatches(20, batch_size=6, seed=4, rank=rank, world=world, **kind)
            batches.set_epoch(3, start=1)
            shares.append(list(batches))
        got = [joined(parts) for parts in zip(*shares, strict=True)]
        assert got == [[(3, i) for i in order[first : first + 6]] for first in (6, 12)]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_the_same_global_batches(world):
    ranks = [TrainBatches(20, batch_size=6, seed=4, rank=rank, world=world) for rank in range(world)]
    for batches in ranks:
        batches.set_epoch(5)
    order = epoch_order(20, seed=4, epoch=5)
    assert [len(batches) for batches in ranks] == [3] * world
    for b, shares in enumerate(zip(*ranks, strict=True)):
        assert all(len(share) == 6 // world for share in shares)
        assert joined(shares) == [(5, int(i)) for i in order[6 * b : 6 * b + 6]]
    assert b == 2


def test_epochs_have_their_own_order_and_can_be_entered_midway():
    batches = TrainBatches(20, batch_size=6, seed=4)
    epochs = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
    assert epochs[0] != epochs[1]
    batches.set_epoch(1, start=2)
    assert len(batches) == 1
    assert list(batches) == epochs[1][2:]
    assert batches.per_epoch == 3
    batches.set_epoch(1)
    assert list(batches) == epochs[1]


@pytest.mark.parametrize(("batch_size", "world", "reason"), [(21, 1, "20"), (0, 1, "20"), (9, 2, "2 processes")])
def test_impossible_training_batches_are_refused(batch_size, world, reason):
    with pytest.raises(ValueError, match=rf"TRAIN\.BATCH_SIZE {batch_size}: .*{reason}"):
        TrainBatches(20, batch_size=batch_size, seed=0, world=world)


@pytest.mark.parametrize("n", [1, 2, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_test_batches_hold_every_image_once(n, world, batch_size):
    seen = []
    for rank in range(world):
        batches = loader.TestBatches(n, batch_size=batch_size, rank=rank, world=world)
        got = list(batches)
        assert len(batches) == len(got)
        assert all(1 <= len(batch) <= max(1, batch_size // world) for batch in got)
        assert joined(got) == list(range(rank, n, world))
        seen += joined(got)
    assert sorted(seen) == list(range(n))


def test_an_impossible_test_batch_is_refused():
    with pytest.raises(ValueError, match=r"TEST\.BATCH_SIZE 0"):
        loader.TestBatches(5, batch_size=0)


# ------------------------------------------------------------------------------------------------ loading


def load(root: Path, *, workers: int, rank: int = 0, world: int = 1, epochs=(0, 1)) -> dict:
    """{(epoch, index): (image bytes, label)} of a rank's share."""
    dataset = dataset_of(root)
    batches = TrainBatches(14, batch_size=6, seed=8, rank=rank, world=world)
    data = make_loader(dataset, batches, workers=workers, pin_memory=False)
    out = {}
    for epoch in epochs:
        batches.set_epoch(epoch)
        for images, labels, indices, _, _ in data:
            assert images.shape == (6 // world, 3, 24, 24)
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.dtype == indices.dtype == torch.int64
            for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
                out[epoch, index] = image.numpy().tobytes(), label
    return out


def test_workers_and_ranks_change_nothing(folder):
    alone = load(folder, workers=0)
    assert len(alone) == 24
    assert {index % 5 == label for (_, index), (_, label) in alone.items()} == {True}
    assert load(folder, workers=2) == alone
    for world in (2, 3):
        union: dict = {}
        for rank in range(world):
            union |= load(folder, workers=0, rank=rank, world=world)
        assert union == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_fast_batches(folder, workers):
    dataset = dataset_of(folder, FastTrainTransform(24))
    data = make_loader(dataset, TrainBatches(14, batch_size=4, seed=8), workers=workers, pin_memory=False)
    for batch in data:
        want = dataset.__getitems__([(0, index) for index in batch.indices.tolist()])
        assert batch.images.dtype == torch.uint8
        assert all(np.array_equal(got, expected) for got, expected in zip(batch[:4], want[:4], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_iteration_leaves_nothing_behind(folder, workers):
    """Signals and batch-norm statistics end an iteration anywhere; the next one begins where it is told to."""
    dataset = dataset_of(folder)
    batches = TrainBatches(14, batch_size=2, seed=8)
    data = make_loader(dataset, batches, workers=workers, pin_memory=False)
    kept = []
    for taken, epoch, start in ((1, 0, 0), (3, 2, 4), (0, 1, 1), (2, 2, 4), (7, 0, 0), (2, 2, 3), (1, 1, 6)):
        batches.set_epoch(epoch, start=start)
        assert len(data) == 7 - start
        order = epoch_order(14, seed=8, epoch=epoch).reshape(7, 2)
        iterator, got = iter(data), []
        for _ in range(taken):
            batch = next(iterator, None)
            if batch is not None:
                got.append(batch.indices.tolist())
                kept.append((epoch, batch))
        assert got == order[start : start + taken].tolist()
    for epoch, batch in kept:  # nor was anything written over
        want = dataset.__getitems__([(epoch, index) for index in batch.indices.tolist()])
        assert np.array_equal(batch.images, want.images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_told(folder, tmp_path, workers):
    for i in range(14):
        (tmp_path / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[: 100 if i in (4, 5) else None])
    (tmp_path / "list.txt").write_text((folder / "list.txt").read_text())
    dataset = LandmarkDataset(
        tmp_path, tmp_path / "list.txt", transform=TrainTransform(24), num_classes=5, seed=3, skip_broken=True
    )
    data = make_loader(dataset, loader.TestBatches(14, batch_size=5), workers=workers, pin_memory=False)
    got = list(data)
    assert joined(batch.indices.tolist() for batch in got) == [0, 1, 2, 3, 6, 6, *range(6, 14)]
    lines = [[message.split(", ")[1].split(":")[0] for message in batch.broken] for batch in got]
    assert lines == [["line 5", "line 6"], ["line 6"], []]


def test_the_order_of_batches_does_not_depend_on_workers(folder):
    def indices(workers: int) -> list:
        batches = TrainBatches(14, batch_size=2, seed=8)
        return [b.indices.tolist() for b in make_loader(dataset_of(folder), batches, workers=workers, pin_memory=False)]

    assert indices(0) == indices(2)


def test_test_images_once_with_an_empty_rank(folder):
    dataset = dataset_of(folder, Resized(30, 24))
    got = []
    for rank in range(16):  # more ranks than images
        batches = loader.TestBatches(14, batch_size=32, rank=rank, world=16)
        data = make_loader(dataset, batches, workers=0, pin_memory=False)
        got += [index for batch in data for index in batch.indices.tolist()]
        assert len(data) == (rank < 14)
    assert sorted(got) == list(range(14))


def test_loading_leaves_the_global_random_state_alone(folder):
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    load(folder, workers=0)
    load(folder, workers=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], legacy)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_surfaces_as_the_plain_error(folder, tmp_path, workers):
    for i in range(14):
        (tmp_path / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes())
    (tmp_path / "list.txt").write_text((folder / "list.txt").read_text())
    dataset = dataset_of(tmp_path)
    for i in (11, 4):
        (tmp_path / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:-20])
    batches = TrainBatches(14, batch_size=7, seed=0)
    data = make_loader(dataset, batches, workers=workers, pin_memory=False)
    with pytest.raises(ImageError):
        list(data)
    with pytest.raises(ImageError) as caught:  # and the loader can be used again
        list(data)
    first, message = next(i for _, i in joined(batches) if i in (4, 11)), str(caught.value)
    assert type(caught.value) is ImageError
    assert message.startswith(f"{tmp_path}/list.txt, line {first + 1}: {tmp_path}/{first}.png: truncated")
    assert "\n" not in message
    start = time.monotonic()
    del data, caught
    gc.collect()
    assert time.monotonic() - start < 4  # workers left to the garbage collector are waited for 5 s each


@pytest.fixture
def pinned(monkeypatch) -> set[int]:
    """Stands in for a GPU: the threads in which something was pinned."""
    threads: set[int] = set()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: threads.add((threading.get_ident(), device)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: threads.add(threading.get_ident()) or self.clone())
    yield threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned_by_another_thread(folder, pinned, workers):
    batches = TrainBatches(14, batch_size=2, seed=8)
    plain = list(make_loader(dataset_of(folder), batches, workers=0))
    data = make_loader(dataset_of(folder), batches, workers=workers, pin_memory=True)
    next(iter(data))  # left at once
    for got, want in zip(data, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True))
    assert {device for entry in pinned if isinstance(entry, tuple) for device in entry[1:]} == {3}
    assert len(pinned) >= 2 and threading.get_ident() not in pinned
    data.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pin")]


def test_an_interrupt_does_not_wait_for_a_worker_that_is_stuck(pinned):
    data = make_loader(Does(), [[1], ["stuck"], [3]], workers=1, pin_memory=True)
    items = iter(data)
    assert next(items)[0] == 1
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test before this one may have changed it
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(items)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 20  # of the 60 that an image may take


# ------------------------------------------------------------------------------------------------ real processes


PROGRAM = """
import sys
sys.path.insert(0, ".")
import cv2, numpy as np
from pathlib import Path
from datasets.landmark import LandmarkDataset
from datasets.loader import TrainBatches, make_loader
from tests.loader_sets import Told

cv2.setNumThreads(4)
cv2.resize(np.zeros((1200, 1600, 3), np.float32), (1700, 1300))  # OpenCV's threads run before the workers start
root = Path(sys.argv[1])
dataset = LandmarkDataset(root, root / "list.txt", transform=Told(24), num_classes=5, seed=3)
batches = TrainBatches(14, batch_size=2, seed=8)
loader = make_loader(dataset, batches, workers=2, pin_memory=False)
workers = set()
epoch = 0
while sys.argv[2] == "forever" or epoch < 2:
    batches.set_epoch(epoch)
    for batch in loader:
        workers |= {int(i) for i in batch.images[:, 0, 0, 0]}
        if len(workers) == 2 and epoch == 1:
            print(*workers, flush=True)
    epoch += 1
"""


def start(folder: Path, how_long: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), how_long],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run started in the background ignores SIGINT and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_workers_started_beside_opencv_threads_do_not_hang(folder):
    process = start(folder, "two epochs")
    try:
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert len(out.split()) >= 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("whole_group", [True, False], ids=["ctrl-c", "kill -INT"])
def test_an_interrupt_leaves_no_workers_and_none_of_them_reports_it(folder, whole_group):
    process = start(folder, "forever")
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(alive, workers))
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        deadline = time.monotonic() + 5
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, workers))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert err.count("KeyboardInterrupt") == 1, err  # the main process; workers ignore the signal
